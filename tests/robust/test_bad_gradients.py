"""NaN and infinity in gradients: "raise" names the parameter, "skip" moves no byte, "ignore" is what torch does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from whole_bytes import difference, everything, model_bytes

from selective import MGUP, Dense, Eigenbasis, Magma, RandomMask, SelectiveUpdate

SHAPES = {"a": (6, 4), "b": (5,), "c": (4, 6), "d": (0, 3)}
CAPTURES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fused": lambda params: torch.optim.AdamW(params, lr=0.1),
    "scratch": lambda params: torch.optim.NAdam(params, lr=0.1),
    "delta": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
}
STEPS = 12
# Where the bad gradients are: (steps, parameters).
PLACES = {
    "one parameter": ({4}, "c"),
    "all": ({4}, "abc"),
    "one step in ten": ({2, 11}, "b"),
    "first step": ({0}, "a"),
    "first steps, all": ({0, 1}, "abc"),
}
BAD = {"nan": float("nan"), "infinity": float("inf"), "minus infinity": -float("inf")}


def make(capture: str, rotated: bool, way: str, policy: Any = None) -> SelectiveUpdate:
    named = [
        (name, torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i))))
        for i, (name, shape) in enumerate(SHAPES.items())
    ]
    return SelectiveUpdate(
        CAPTURES[capture](named), policy=policy or RandomMask(), capture=capture,  # type: ignore[arg-type]
        preconditioner=Eigenbasis(refresh_every=3) if rotated else None, on_nonfinite=way,  # type: ignore[arg-type]
    )  # fmt: skip


def give(optimizer: SelectiveUpdate, step: int, bad: float | None = None, where: str = "") -> None:
    for index, (name, p) in enumerate(zip(SHAPES, optimizer.param_groups[0]["params"], strict=True)):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + index))
        if bad is not None and name in where:
            p.grad.view(-1)[-1] = bad


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("policy", [RandomMask(), Magma(), Dense()], ids=lambda p: p.kind)
def test_skip_leaves_every_byte(capture: str, rotated: bool, place: str, policy: Any) -> None:
    """... and the run goes on as one that never had that step: random policies draw for steps that were taken."""
    steps, where = PLACES[place]
    optimizer, twin = (make(capture, rotated, "skip", policy) for _ in range(2))
    for step in range(STEPS):
        if step in steps:
            bad = list(BAD.values())[step % 3]
            give(optimizer, step, bad, where)
            before = everything(optimizer)
            optimizer.step()
            assert difference(before, everything(optimizer)) is None
        else:
            for one in (optimizer, twin):
                give(one, step)
                one.step()
    assert difference(everything(twin)["state"], everything(optimizer)["state"]) is None
    assert model_bytes(optimizer) == model_bytes(twin)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize("capture", CAPTURES)
def test_raise_names_the_parameter_and_nothing_has_moved(capture: str, rotated: bool, place: str, bad: str) -> None:
    steps, where = PLACES[place]
    optimizer = make(capture, rotated, "raise")
    for step in range(max(steps) + 1):
        if step in steps:
            give(optimizer, step, BAD[bad], where)
            before = everything(optimizer)
            count = len([s for s in range(step) if s not in steps])
            with pytest.raises(FloatingPointError, match=f"parameter '{where[0]}' is not finite in step {count}"):
                optimizer.step()
            assert difference(before, everything(optimizer)) is None
        else:
            give(optimizer, step)
            optimizer.step()


@pytest.mark.parametrize("capture", CAPTURES)
def test_ignore_is_what_the_base_does(capture: str) -> None:
    """Dense without a preconditioner: the same bytes as the base, the same NaN at the same places."""
    optimizer = make(capture, False, "ignore", Dense())
    plain = make(capture, False, "ignore", Dense()).base
    for step in range(4):
        for one in (optimizer, plain):
            give(one, step, BAD["nan"] if step == 2 else None, "c")  # type: ignore[arg-type]
            one.step()
    assert model_bytes(optimizer) == model_bytes(plain)  # type: ignore[arg-type]
    assert optimizer.param_groups[0]["params"][2].isnan().sum() == 1


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("policy", [RandomMask(), MGUP(), Magma()], ids=lambda p: p.kind)
def test_ignore_stays_with_the_parameter(capture: str, rotated: bool, policy: Any) -> None:
    """A parameter's NaN changes that parameter alone: the others are those of the run without."""
    optimizer, twin = (make(capture, rotated, "ignore", policy) for _ in range(2))
    for step in range(5):
        give(optimizer, step, BAD["nan"] if step == 2 else None, "c")
        give(twin, step)
        optimizer.step()
        twin.step()
    ours, theirs = model_bytes(optimizer), model_bytes(twin)
    assert ours[:2] == theirs[:2]
    assert ours[2] != theirs[2]
    assert optimizer.param_groups[0]["params"][2].isnan().any()  # the comparison has something to see


def test_a_skip_that_moves_something_is_noticed() -> None:
    """The twin: one byte of a basis, one count."""
    optimizer = make("fused", True, "skip", Magma())
    give(optimizer, 0)
    optimizer.step()
    before = everything(optimizer)
    entries = optimizer.state[optimizer.param_groups[0]["params"][0]]
    entries["selective/basis/refreshes"] = entries["selective/basis/refreshes"] + 1
    assert "refreshes" in (difference(before, everything(optimizer)) or "")
    entries["selective/basis/refreshes"] = entries["selective/basis/refreshes"] - 1
    assert difference(before, everything(optimizer)) is None
    optimizer.count.steps += 1
    assert difference(before, everything(optimizer)) is not None
