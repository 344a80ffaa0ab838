"""Lightning: automatic and manual optimization, accumulation, clipping, schedules, a checkpoint and the resume."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from stack_loops import BATCH, CASES, assert_same, by_hand, data, differences, net, wrap
from torch.utils.data import DataLoader

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # lightning looks for pkg_resources
    lightning = pytest.importorskip("lightning.pytorch")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning"),
]


class Module(lightning.LightningModule):
    def __init__(self, case: str, manual: bool = False, schedule: bool = False) -> None:
        super().__init__()
        self.net, self.case, self.schedule = net(), case, schedule
        self.automatic_optimization = not manual

    def training_step(self, batch: Any, number: int) -> Any:
        x, y = batch
        loss = torch.nn.functional.mse_loss(self.net(x), y)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = wrap(self.net, self.case)
        if not self.schedule:
            return optimizer
        rates = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}


def fit(module: Module, batches: int, folder: Path, resume: str | None = None, **options: Any) -> Any:
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=batches // options.get("accumulate_grad_batches", 1), logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing="callbacks" in options,
        default_root_dir=folder, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data(), batch_size=BATCH), ckpt_path=resume)
    return trainer


def pair(module: Module, trainer: Any) -> tuple[Any, Any]:
    return module.net, trainer.optimizers[0]


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_the_plain_loop(case: str, manual: bool, tmp_path: Path) -> None:
    module = Module(case, manual)
    trainer = fit(module, 6, tmp_path)
    assert_same(pair(module, trainer), by_hand(case, 6))


@pytest.mark.parametrize("case", ["mgup", "random-soap"])
def test_accumulation_and_clipping(case: str, tmp_path: Path) -> None:
    module = Module(case)
    trainer = fit(module, 8, tmp_path, accumulate_grad_batches=2, gradient_clip_val=0.1)
    assert_same(pair(module, trainer), by_hand(case, 4, accumulate=2, clip=0.1))
    assert differences(pair(module, trainer), by_hand(case, 4, accumulate=2))


def saving(folder: Path) -> Any:
    """A checkpoint every three steps."""
    return lightning.callbacks.ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=3, save_top_k=-1, save_on_train_epoch_end=False
    )


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_goes_on_bit_for_bit(case: str, manual: bool, tmp_path: Path) -> None:
    epochs = {"limit_train_batches": 3}  # a checkpoint at the end of each: torch's DataLoader starts anew after one
    whole = Module(case, manual, schedule=True)
    expected = pair(whole, fit(whole, 8, tmp_path, callbacks=[saving(tmp_path)], **epochs))
    for at in (3, 6):
        resumed = Module(case, manual, schedule=True)
        file = str(tmp_path / f"step={at}.ckpt")
        trainer = fit(resumed, 8, tmp_path, resume=file, callbacks=[saving(tmp_path)], **epochs)
        assert_same(pair(resumed, trainer), expected)
    cold = Module(case, manual, schedule=True)
    assert differences(pair(cold, fit(cold, 5, tmp_path, **epochs)), expected)


def test_a_schedule_moves_the_learning_rate_of_the_base(tmp_path: Path) -> None:
    module = Module("mgup", schedule=True)
    trainer = fit(module, 4, tmp_path)
    assert trainer.optimizers[0].base.param_groups[0]["lr"] == pytest.approx(0.01 * 0.9**4)
