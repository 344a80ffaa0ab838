"""The doctor leaves no trace: a run that it interrupts goes on bit for bit, and nothing that can be seen is changed."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import optimi
import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn

from selective import MGUP, Cautious, CautiousDecay, ChainedOptimizer, Magma, RandomMask, SelectiveUpdate, Soap
from selective.doctor import doctor, examine
from selective.doctor.restore import restored

Params = list[nn.Parameter]


class Eccentric(torch.optim.Optimizer):
    """A base that keeps state in every way that there is, and replaces what it can."""

    def __init__(self, params: Params) -> None:
        super().__init__(params, {"lr": 0.1, "k": 0, "count": torch.zeros(())})
        self.history: list[float] = []
        self.sums = {"all": torch.zeros(2)}
        self.noise = torch.Generator().manual_seed(3)
        self.seen: set[int] = set()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.history.append(len(self.history) + 0.5)
        self.sums["all"] += 1
        self.seen.add(len(self.history))
        self.scale = 1 + len(self.seen) / 100
        for group in self.param_groups:
            group["k"] += 1
            group["count"] += 1
            for p in group["params"]:
                state = self.state[p]
                state["old"] = state.get("old", [torch.zeros_like(p)])
                state["old"][0].mul_(0.9).add_(p.grad)
                state["nested"] = {"norm": p.grad.norm() + group["k"]}
                noise = 0.01 * torch.randn(p.shape, generator=self.noise) * self.sums["all"][0]
                p.data = p.data - group["lr"] * self.scale * (state["old"][0] + noise)
                p.grad.zero_()


def both(params: Params) -> ChainedOptimizer:
    matrices, rest = [p for p in params if p.dim() == 2], [p for p in params if p.dim() != 2]
    return ChainedOptimizer(
        {
            "matrices": SelectiveUpdate(torch.optim.Muon(matrices, lr=0.1), policy=Cautious()),
            "rest": torch.optim.AdamW(rest, lr=0.1),
        }
    )


OPTIMIZERS: dict[str, Callable[[Params], torch.optim.Optimizer]] = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.1),
    "eccentric": Eccentric,
    "AdamW, selective": lambda ps: SelectiveUpdate(
        torch.optim.AdamW(ps, lr=0.1, weight_decay=0.1), policy=MGUP(), decay=CautiousDecay(), momentum_beta=0.9
    ),
    "rotated": lambda ps: SelectiveUpdate(
        torch.optim.AdamW(ps, lr=0.1), policy=Magma(), preconditioner=Soap(refresh_every=2)
    ),
    "rotated one by one": lambda ps: SelectiveUpdate(
        pytorch_optimizer.AdaBelief(ps, lr=0.1), policy=RandomMask(), preconditioner=Soap(refresh_every=2)
    ),
    "with a residue": lambda ps: SelectiveUpdate(optimi.AdamW(ps, lr=0.1, kahan_sum=True), policy=Cautious()),
    "scratch": lambda ps: SelectiveUpdate(pytorch_optimizer.AdaBelief(ps, lr=0.1), policy=Cautious()),
    "chain": both,
}


def parameters(dtype: torch.dtype = torch.float32) -> Params:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((4, 3), (3,), (5, 4))]


def train(optimizer: torch.optim.Optimizer, params: Params, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def everything(optimizer: torch.optim.Optimizer, params: Params) -> dict[str, Any]:
    """Return all that can be seen of an optimizer and its parameters, as copies."""
    seen = {
        "params": [p.detach().clone() for p in params],
        "grads": [None if p.grad is None else p.grad.clone() for p in params],
        "saved": copy.deepcopy(optimizer.state_dict()),
        "skipped": getattr(optimizer, "skipped_steps", None),
        "random": [torch.get_rng_state(), random.getstate(), numpy.random.get_state()],
    }
    if isinstance(optimizer, Eccentric):
        seen["own"] = [optimizer.history, optimizer.sums, optimizer.seen, getattr(optimizer, "scale", None)]
        seen["own"] = copy.deepcopy([*seen["own"], optimizer.noise.get_state()])
    if isinstance(optimizer, (SelectiveUpdate, ChainedOptimizer)):
        seen["statistics"] = copy.deepcopy(optimizer.statistics())
    return seen


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(numpy.array_equal(a, b)) if isinstance(a, numpy.ndarray) else bool(a == b)


def run(name: str, dtype: torch.dtype, taken: int, look: Callable[[torch.optim.Optimizer], None]) -> dict[str, Any]:
    """Train so many steps, look, and train two more."""
    params = parameters(dtype)
    optimizer = OPTIMIZERS[name](params)
    train(optimizer, params, 0, taken)
    look(optimizer)
    train(optimizer, params, taken, taken + 2)
    return everything(optimizer, params)


def look_and_compare(optimizer: torch.optim.Optimizer) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before, gradients, places = everything(optimizer, params), [p.grad for p in params], [p.data_ptr() for p in params]
    report = doctor(optimizer)
    assert report.steps.taken == 5, report.steps.failure
    assert same(everything(optimizer, params), before)
    assert all(p.grad is gradient for p, gradient in zip(params, gradients, strict=True))
    assert [p.data_ptr() for p in params] == places


@pytest.mark.parametrize(
    ("name", "taken"), [*((name, 3) for name in OPTIMIZERS), ("eccentric", 0), ("rotated", 0), ("chain", 0)]
)
def test_training_goes_on_bit_for_bit(name: str, taken: int) -> None:
    dtype = torch.bfloat16 if name == "with a residue" else torch.float32
    assert same(run(name, dtype, taken, look_and_compare), run(name, dtype, taken, lambda _: None))


@contextlib.contextmanager
def nothing(_: Any) -> Iterator[None]:
    yield


@pytest.mark.parametrize("name", ["eccentric", "rotated"])
def test_without_putting_back_it_would_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine, "restored", nothing)
    looked = run(name, torch.float32, 3, lambda optimizer: doctor(optimizer) and None)
    assert not same(looked, run(name, torch.float32, 3, lambda _: None))


def test_it_is_put_back_where_a_step_fails() -> None:
    params = parameters()
    optimizer = Eccentric(params)
    train(optimizer, params, 0, 1)
    before = everything(optimizer, params)
    optimizer.register_step_post_hook(lambda *_: 1 / 0)
    report = doctor(optimizer)
    assert report.steps.failure is not None
    assert "ZeroDivisionError" in report.steps.failure
    assert same(everything(optimizer, params), before)


def test_tensors_and_containers_stay_the_same_objects() -> None:
    params = parameters()
    optimizer = Eccentric(params)
    train(optimizer, params, 0, 2)
    state, sums = optimizer.state[params[0]], optimizer.sums["all"]
    old = state["old"][0]
    with restored(optimizer):
        train(optimizer, params, 2, 4)
        optimizer.state.clear()
        optimizer.sums = {}
        params[1].grad = None
    assert optimizer.state[params[0]] is state
    assert optimizer.state[params[0]]["old"][0] is old
    assert optimizer.sums["all"] is sums
    assert params[1].grad is not None


class Unwritable(Tensor):
    """A tensor that can be read and not written."""

    def copy_(self, *_: Any) -> Any:
        raise NotImplementedError("it can't be written")


def test_what_cannot_be_put_back_is_an_error_and_all_else_is_put_back() -> None:
    params = parameters()
    optimizer = Eccentric(params)
    optimizer.own = [torch.ones(2).as_subclass(Unwritable)]  # type: ignore[attr-defined]
    before = everything(optimizer, params)
    with pytest.raises(NotImplementedError, match="can't be written"), restored(optimizer):
        train(optimizer, params, 0, 2)
    for p in params:
        p.grad = None
    assert same(everything(optimizer, params), before)


def test_a_schedule_does_not_notice() -> None:
    params = parameters()
    optimizer = SelectiveUpdate(torch.optim.AdamW(params, lr=0.1), policy=Cautious())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    doctor(optimizer)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step"):
        schedule.step()  # no step of the training has been taken
    assert schedule.get_last_lr() == [0.05]
