"""DeepSpeed on one process of a CPU: stage 0 steps as the wrapper does, ZeRO 1 and 2 are refused in the first step."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from optional import missing
from stack_loops import BATCH, CASES, LR, batch, net, wrap
from torch import nn

if missing(["deepspeed"]):
    pytest.skip("needs deepspeed", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def _alone_in_the_world() -> Iterator[None]:
    """The group of one process that DeepSpeed asks for."""
    environment = {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        for name, value in environment.items():
            patch.setenv(name, value)
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _their_operator_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """An all-reduce through shared memory, which takes minutes to compile and a compiler."""
    monkeypatch.setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)


def engine(model: nn.Module, optimizer: Any, stage: int) -> Any:
    import deepspeed

    settings = {
        "train_batch_size": BATCH, "gradient_clipping": 0.5, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }  # fmt: skip
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def train(made: Any, first: int, last: int) -> list[list[torch.Tensor]]:
    """The gradients of each step, as they were when the optimizer saw them."""
    seen: list[list[torch.Tensor]] = []
    params = [p for group in made.basic_optimizer.param_groups for p in group["params"]]
    handle = made.basic_optimizer.register_step_pre_hook(lambda *_: seen.append([p.grad.clone() for p in params]))
    for step in range(first, last):
        x, y = batch(step)
        made.backward(nn.functional.mse_loss(made(x), y))
        made.step()
    handle.remove()
    return seen


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # theirs
@pytest.mark.parametrize("case", CASES)
def test_stage_0_steps_as_the_wrapper_by_hand(case: str) -> None:
    model = net()
    optimizer = wrap(model, case)
    gradients = train(engine(model, optimizer, 0), 0, 4)
    twin = net()
    by_hand = wrap(twin, case)
    for step in gradients:
        for p, gradient in zip(twin.parameters(), step, strict=True):
            p.grad = gradient.clone()
        by_hand.step()
    assert len(gradients) == 4 and not any(map(torch.equal, model.parameters(), net().parameters()))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # theirs
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("case", [case for case in CASES if case != "dense"])
def test_zero_is_refused_in_the_first_step(case: str, stage: int) -> None:
    model = net()
    made = engine(model, wrap(model, case), stage)
    with pytest.raises(ValueError, match=r"one flat vector of \d+ elements now: .*FSDP2.*stage 0"):
        train(made, 0, 1)
    assert all(map(torch.equal, model.parameters(), net().parameters()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # theirs
def test_zero_with_the_base_alone_is_that_of_the_base() -> None:
    bare, dense = net(), net()
    train(engine(bare, torch.optim.AdamW(bare.parameters(), lr=LR), 1), 0, 4)
    train(engine(dense, wrap(dense, "dense"), 1), 0, 4)
    assert all(torch.equal(p, q) for p, q in zip(bare.parameters(), dense.parameters(), strict=True))
