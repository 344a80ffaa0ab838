"""The callbacks for Lightning and the Trainer: what loggers and writers get, and that they let go at the end."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from optional import missing
from stack_loops import BATCH, LR, data, net, plain, train, wrap
from torch.utils.data import DataLoader

from selective import watch
from selective.callbacks import lightning_callback, trainer_callback
from selective.watching import Sample, tensorboard

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
]


def lightning() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for pkg_resources
        return pytest.importorskip("lightning.pytorch")


def fit(optimizer_of: Any, steps: int, callback: Any, logger: Any = False, fails: bool = False) -> Any:
    package = lightning()

    class Module(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any, number: int) -> Any:
            if fails and number == 3:
                raise RuntimeError("out of memory")
            return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return optimizer_of(self.net)

    trainer = package.Trainer(
        accelerator="cpu", max_steps=steps, logger=logger, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[callback], log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(data(), batch_size=BATCH))
    return trainer


def expected(steps: int, every: int) -> list[Sample]:
    model = net()
    optimizer = wrap(model, "mgup")
    samples: list[Sample] = []
    with watch(optimizer, samples.append, every=every, model=model):
        train(model, optimizer, range(steps))
    return samples


def test_lightning_hands_samples_to_writers() -> None:
    lightning()  # or skip
    samples: list[Sample] = []
    trainer = fit(lambda model: wrap(model, "mgup"), 7, lightning_callback(samples.append, every=3))
    plain_names = [
        Sample(one.step, {name.removeprefix("net."): v for name, v in one.values.items()}) for one in samples
    ]
    assert plain_names == expected(7, 3)
    assert next(iter(samples[0].values)) == "net.0.weight"
    assert not plain(trainer.optimizers[0])._optimizer_step_post_hooks  # it let go


def test_lightnings_loggers_get_the_overview_without_writers() -> None:
    package = lightning()

    class Remembers(package.loggers.logger.DummyLogger):
        def __init__(self) -> None:
            super().__init__()
            self.got: list[tuple[int, dict[str, float]]] = []

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            assert step is not None
            self.got.append((step, dict(metrics)))

    logger = Remembers()
    fit(lambda model: wrap(model, "mgup"), 6, lightning_callback(every=2), logger=logger)
    ours = [(step, got) for step, got in logger.got if "selective/share" in got]
    assert ours == [(s.step, {f"selective/{k}": v for k, v in s.overview().items()}) for s in expected(6, 2)]


def test_lightning_lets_go_when_training_fails_and_refuses_other_optimizers() -> None:
    lightning()  # or skip
    callback = lightning_callback(print, every=100)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(lambda model: wrap(model, "mgup"), 7, callback, fails=True)
    assert callback.watches == []
    with pytest.raises(TypeError, match="no optimizer of this run is a SelectiveUpdate; found AdamW"):
        fit(lambda model: torch.optim.AdamW(model.parameters(), lr=LR), 2, lightning_callback(print))


class Net(torch.nn.Module):
    """As the Trainer calls a model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.net(x)
        return {"loss": torch.nn.functional.mse_loss(out, labels), "logits": out}


def run_trainer(callback: Any, folder: Path, steps: int = 7) -> Any:
    if missing(["transformers", "accelerate"]):
        pytest.skip("needs transformers and accelerate")
    transformers = pytest.importorskip("transformers")

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = Net()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=BATCH, report_to=[], use_cpu=True,
        lr_scheduler_type="constant", max_grad_norm=0.0, disable_tqdm=True, logging_strategy="no",
        dataloader_pin_memory=False, save_strategy="steps", save_steps=4,
    )  # fmt: skip
    rows = [{"x": x, "labels": y} for x, y in data()]
    trainer = InOrder(
        model=model, args=arguments, train_dataset=rows, optimizers=(wrap(model, "mgup"), None), callbacks=[callback]
    )
    trainer.train()
    return trainer


def test_the_trainer_hands_samples_to_writers(tmp_path: Path) -> None:
    samples: list[Sample] = []
    trainer = run_trainer(trainer_callback(samples.append, every=3), tmp_path)
    named = [Sample(s.step, {n.removeprefix("net."): v for n, v in s.values.items()}) for s in samples]
    assert named == expected(7, 3)
    assert not plain(trainer.optimizer)._optimizer_step_post_hooks


def test_the_trainers_history_has_the_overview_and_is_saved(tmp_path: Path) -> None:
    run_trainer(trainer_callback(every=2), tmp_path)
    history = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert history == [
        {"step": s.step, **{f"selective/{k}": v for k, v in s.overview().items()}} for s in expected(5, 2)
    ]


def test_tensorboard_files_can_be_read_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torch.utils.tensorboard import SummaryWriter
    model = net()
    optimizer = wrap(model, "mgup")
    with SummaryWriter(str(tmp_path)) as board, watch(optimizer, tensorboard(board, each=True), every=2, model=model):
        train(model, optimizer, range(6))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("selective/share")] == [(2, 0.5), (4, 0.5), (6, 0.5)]
    assert "selective/cosine/0.weight" in events.Tags()["scalars"]


def test_import_selective_needs_none_of_the_stacks() -> None:
    names = ("lightning", "pytorch_lightning", "transformers", "accelerate", "tensorboard")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({names})); import selective, selective.callbacks; "
        "from selective.watching import tensorboard; tensorboard(None); print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr
