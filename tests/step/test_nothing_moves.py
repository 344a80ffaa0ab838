"""A step that can't be taken is refused before any group moves: parameters, states and counts stay as they were."""

from __future__ import annotations

from collections import UserList
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from whole_bytes import difference, everything

from selective import Cautious, Policy, SelectiveUpdate, Soap
from selective.policies.view import StepView

OTHERS = {
    "dense": {"policy": None},
    "masked": {},
    "rotated": {"preconditioner": Soap(refresh_every=1)},
    "rotated and dense": {"preconditioner": Soap(refresh_every=1), "policy": None},
}


class MayRefuse(Policy):
    """A policy of somebody's own, whose state can't always be made."""

    refuses: ClassVar[bool] = False

    def init_state(self, view: StepView) -> dict[str, Tensor]:
        if self.refuses:
            raise ArithmeticError("not today")
        return {"count": torch.zeros(())}

    def mask(self, view: StepView) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.ones(view.shape), {"count": view.state["count"] + 1}


def other_shape(group: dict[str, Any]) -> None:
    group["params"][0].grad.data = torch.ones(3)


def number_is(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda group: group.__setitem__(name, value)


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "gradient": (other_shape, r"param_groups\[1\]\[0\]' has shape \(3, 4\), its gradient \(3,\)"),
    "rate is a text": (
        number_is("lr", "1e-3"),
        r"param_groups\[1\]\['lr'\] is '1e-3', must be a number; nothing has m",
    ),
    "no rate": (number_is("lr", None), r"param_groups\[1\]\['lr'\] is None, must be a number"),
    "one beta": (number_is("betas", (0.9,)), r"param_groups\[1\]\['betas'\] is \(0.9,\), must be two numbers"),
    "betas": (number_is("betas", (0.9, "0.99")), r"param_groups\[1\]\['betas'\] is \(0.9, '0.99'\), must be two n"),
    "decay": (number_is("weight_decay", "0"), r"param_groups\[1\]\['weight_decay'\] is '0', must be a number"),
}


def built(other: str, last: dict[str, Any]) -> SelectiveUpdate:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(rows, 4, generator=generator)) for rows in (5, 3)]
    groups = [{"params": params[:1], **OTHERS[other]}, {"params": params[1:], **last}]
    return SelectiveUpdate(torch.optim.AdamW(groups, lr=0.1), policy=Cautious())


def give(optimizer: SelectiveUpdate, number: int, groups: slice = slice(None)) -> None:
    generator = torch.Generator().manual_seed(number)
    for group in optimizer.param_groups[groups]:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("other", "last"),
    [("dense", {}), ("rotated", {}), ("rotated and dense", {"preconditioner": Soap()}), ("masked", {"policy": None})],
    ids=["dense", "rotated", "rotated and dense", "masked, and dense last"],
)
def test_a_group_that_can_not_be_stepped_stops_the_others(other: str, last: dict[str, Any], fault: str) -> None:
    optimizer = built(other, last)
    for number in range(2):
        give(optimizer, number)
        optimizer.step()
    give(optimizer, 2)
    spoil, message = FAULTS[fault]
    good = dict(optimizer.param_groups[1])
    spoil(optimizer.param_groups[1])
    before = everything(optimizer)
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.step()
    assert difference(before, everything(optimizer)) is None
    assert optimizer.count.steps == 2
    optimizer.param_groups[1].update(good)
    give(optimizer, 2)
    optimizer.step()
    twin = built(other, last)
    for number in range(3):
        give(twin, number)
        twin.step()
    assert difference(everything(twin)["state"], everything(optimizer)["state"]) is None


@pytest.mark.parametrize("other", OTHERS)
def test_a_state_that_can_not_be_made_stops_the_others(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """... also that of a parameter whose first gradient comes late."""
    optimizer = built(other, {"policy": MayRefuse()})
    give(optimizer, 0, slice(1))
    optimizer.step()
    give(optimizer, 1)
    before = everything(optimizer)
    monkeypatch.setattr(MayRefuse, "refuses", True)
    with pytest.raises(ArithmeticError, match="not today"):
        optimizer.step()
    monkeypatch.undo()
    assert difference(before, everything(optimizer)) is None


def test_a_new_policy_s_state_that_can_not_be_made_stops_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = built("masked", {"policy": Cautious()})
    for number in range(2):
        give(optimizer, number)
        optimizer.step()
    del optimizer.state[optimizer.param_groups[1]["params"][0]]
    optimizer.policy_groups[1].policy = MayRefuse()
    give(optimizer, 2)
    before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    with monkeypatch.context() as patch:
        patch.setattr(MayRefuse, "refuses", True)
        with pytest.raises(ArithmeticError, match="not today"):
            optimizer.step()
    assert all(map(torch.equal, before, [p for group in optimizer.param_groups for p in group["params"]]))
    optimizer.step()
    assert optimizer.count.steps == 3


@pytest.mark.parametrize("betas", [UserList([0.9, 0.99]), torch.tensor([0.9, 0.99])], ids=["a list", "a tensor"])
def test_betas_may_be_any_sequence_of_two(betas: Any) -> None:
    optimizer, other = built("masked", {"betas": betas}), built("masked", {"betas": (0.9, 0.99)})
    for one in (optimizer, other):
        give(one, 0)
        one.step()
    for mine, theirs in zip(optimizer.param_groups, other.param_groups, strict=True):
        for a, b in zip(mine["params"], theirs["params"], strict=True):
            torch.testing.assert_close(a, b)  # a tensor has betas of float32
