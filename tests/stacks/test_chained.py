"""`ChainedOptimizer` in training stacks: Muon under MGUP for matrices, a bare AdamW for the rest, and two alike.

Each stack is held against the plain loop, and a resumed run against one that was not interrupted, bit for bit.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from chains import muon_and_adamw, parts_of, two_adamw
from optional import missing
from stack_loops import assert_same, data, differences, loss_of, net, train
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from selective import MGUP, ChainedOptimizer, SelectiveUpdate
from selective.state.entries import STEP

MAKERS = {"muon-adamw": muon_and_adamw, "two-random": lambda model: two_adamw(model, policy="RandomMask", seed=7)}
OF_DCP = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning:torch"),
]


def by_hand(maker: str, steps: int) -> tuple[nn.Module, ChainedOptimizer]:
    model = net()
    optimizer = MAKERS[maker](model)
    train(model, optimizer, range(steps), clip=1.0)
    return model, optimizer


def with_marks(function: Any) -> Any:
    for mark in OF_DCP:
        function = mark(function)
    return function


@with_marks
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("maker", MAKERS)
def test_a_distributed_checkpoint_goes_on_from_files(maker: str, flat: bool, tmp_path: Path) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = by_hand(maker, 3)
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    assert_same((model, optimizer), by_hand(maker, 3))  # saving moved nothing
    fresh = net(1)
    resumed = MAKERS[maker](fresh)  # never stepped
    weights, state = get_state_dict(fresh, resumed, options=options)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(fresh, resumed, model_state_dict=weights, optim_state_dict=state, options=options)
    assert_same((fresh, resumed), (model, optimizer))
    train(model, optimizer, range(3, 6), clip=1.0)
    train(fresh, resumed, range(3, 6), clip=1.0)
    assert_same((fresh, resumed), (model, optimizer))


@with_marks
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
def test_groups_of_different_keys_keep_them(flat: bool) -> None:
    """A scheduler has put a key into one member's groups only, and the members' own options differ anyway."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = by_hand("muon-adamw", 2)
    fresh = net(1)
    resumed = muon_and_adamw(fresh)
    for one in (optimizer, resumed):
        torch.optim.lr_scheduler.StepLR(one.members[1], 1)  # sets initial_lr
        one.members[1].param_groups[0]["lr"] = 0.125
    keys = [set(group) for group in optimizer.param_groups]
    assert keys[0] ^ keys[1] >= {"betas", "momentum", "initial_lr"}
    weights, state = get_state_dict(model, optimizer, options=options)
    set_state_dict(fresh, resumed, model_state_dict=weights, optim_state_dict=copy.deepcopy(state), options=options)
    assert [set(group) for group in resumed.param_groups] == keys
    assert_same((fresh, resumed), (model, optimizer))


@with_marks
def test_a_refused_distributed_checkpoint_leaves_all_members_alone() -> None:
    model, optimizer = by_hand("muon-adamw", 2)
    _, state = get_state_dict(model, optimizer)
    other = net(1)
    matrices, rest = parts_of(other)
    members = [SelectiveUpdate(torch.optim.Muon(matrices), policy="Cautious"), torch.optim.AdamW(rest)]
    fresh = ChainedOptimizer(members)
    with pytest.raises(ValueError, match=r"member '0': .*nothing was loaded"):
        set_optimizer_state_dict(other, fresh, state)
    assert fresh.members[1].param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("maker", MAKERS)
def test_accelerate(maker: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    try:
        accelerator = accelerate.Accelerator(cpu=True)
        start = net()
        model, optimizer = accelerator.prepare(start, MAKERS[maker](start))
        for step in range(6):
            accelerator.backward(loss_of(model, step))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step == 2:
                accelerator.save_state(str(tmp_path / "saved"))
        assert_same((start, optimizer.optimizer), by_hand(maker, 6))
        accelerator.load_state(str(tmp_path / "saved"))
        assert_same((start, optimizer.optimizer), by_hand(maker, 3))
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()


@pytest.mark.filterwarnings("ignore")  # lightning's own hints
def test_lightning_and_its_checkpoint(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from selective.callbacks import lightning_callback

    samples: list[Any] = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any, _: int) -> Any:
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = muon_and_adamw(self.net)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def fit(resume: str | None = None) -> tuple[nn.Module, Any]:
        """Six steps in epochs of three, with a checkpoint after each epoch."""
        saving = lightning.callbacks.ModelCheckpoint(
            tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1, save_on_train_epoch_end=False
        )
        trainer = lightning.Trainer(
            accelerator="cpu", max_steps=6, logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, gradient_clip_val=1.0, limit_train_batches=3,
            callbacks=[saving, lightning_callback(samples.append, every=2)],
        )  # fmt: skip
        module = Module()
        trainer.fit(module, torch.utils.data.DataLoader(data(), batch_size=4), ckpt_path=resume)
        return module.net, trainer.optimizers[0]

    model = net()
    by_steps = muon_and_adamw(model)
    schedule = torch.optim.lr_scheduler.StepLR(by_steps, 2, 0.5)
    for step in range(6):
        train(model, by_steps, [step % 3], clip=1.0, schedule=schedule)
    whole = fit()
    assert_same(whole, (model, by_steps))
    assert [sample.step for sample in samples] == [2, 4, 6]
    assert_same(fit(str(tmp_path / "step=3.ckpt")), whole)
    assert [sample.step for sample in samples[3:]] == [4, 6]


@pytest.mark.filterwarnings("ignore")  # lightning looks for pkg_resources
def test_fabric(tmp_path: Path) -> None:
    """Fabric's stand-in copies attributes: all that changes is seen through it, too."""
    fabric_package: Any = pytest.importorskip("lightning.fabric")

    def setup() -> tuple[Any, nn.Module, Any, Any, ChainedOptimizer]:
        fabric = fabric_package.Fabric(accelerator="cpu", devices=1)
        start = net()
        optimizer = muon_and_adamw(start)
        model, wrapped = fabric.setup(start, optimizer)
        return fabric, start, model, wrapped, optimizer

    fabric, start, model, wrapped, optimizer = setup()
    for step in range(3):
        fabric.backward(loss_of(model, step))
        fabric.clip_gradients(model, wrapped, max_norm=1.0)
        wrapped.step()
        wrapped.zero_grad()
        matrix = wrapped.param_groups[0]["params"][0]
        assert int(wrapped.state[matrix][STEP]) == int(optimizer.state[matrix][STEP]) == step + 1
        assert wrapped.explain() == optimizer.explain()
        assert wrapped.statistics().keys() == optimizer.statistics().keys()
    assert_same((start, optimizer), by_hand("muon-adamw", 3))
    fabric.save(tmp_path / "saved.ckpt", {"model": model, "optimizer": wrapped})
    other, fresh, its_model, its_wrapped, its_optimizer = setup()
    other.load(tmp_path / "saved.ckpt", {"model": its_model, "optimizer": its_wrapped})
    assert_same((fresh, its_optimizer), (start, optimizer))


BATCH, TOKENS, WORDS = 2, 8, 32


def run_trainer(folder: Path, resume: str | None = None) -> tuple[nn.Module, ChainedOptimizer]:
    """Train a small Llama for 6 steps with Muon under MGUP on its matrices, AdamW on the rest; save after 3."""
    import transformers

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=16,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    words = torch.randint(0, WORDS, (16, TOKENS), generator=torch.Generator().manual_seed(1))
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=BATCH, report_to=[], use_cpu=True,
        lr_scheduler_type="cosine", warmup_steps=2, disable_tqdm=True, logging_strategy="no",
        dataloader_pin_memory=False, save_strategy="steps", save_steps=3,
    )  # fmt: skip
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and "head" not in name]
    rest = [p for p in model.parameters() if not any(p is one for one in hidden)]
    muon = SelectiveUpdate(torch.optim.Muon(hidden, lr=0.02), policy=MGUP())
    optimizer = ChainedOptimizer({"matrices": muon, "rest": torch.optim.AdamW(rest, lr=0.01)})
    rows = [{"input_ids": row, "labels": row.clone()} for row in words]
    trainer = InOrder(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=resume)
    return model, optimizer


def test_the_trainer_trains_muon_and_adamw_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    if missing(["transformers", "accelerate"]):
        pytest.skip("needs transformers and accelerate")
    whole = run_trainer(tmp_path)
    steps = {key: int(entries["step"]) for key, entries in whole[1].state_dict()["state"].items() if "step" in entries}
    assert steps and set(steps.values()) == {6}
    shares = [numbers["share"].item() for numbers in whole[1].statistics().values()]
    assert len(shares) == 7 and all(0 < share < 1 for share in shares)
    resumed = run_trainer(tmp_path / "again", str(tmp_path / "checkpoint-3"))
    assert_same(resumed, whole)
    assert differences(run_trainer(tmp_path / "other", str(tmp_path / "checkpoint-6")), whole)  # one step more
