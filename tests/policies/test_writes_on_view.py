"""A mask that writes on its view is found in the first step, in every capture, and the parameters are put back."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from selective import Eigenbasis, Fixed, Policy, PolicyError, Selection, SelectiveUpdate, StepView

TENSORS = ("update", "grad", "momentum", "previous_momentum", "param")


class Writes(Policy):
    """Writes on one tensor of its view, or on a copy of it."""

    on: str = "update"
    copies: bool = False
    reads: ClassVar = frozenset(TENSORS)

    def mask(self, view: StepView) -> Tensor:
        tensor = getattr(view, self.on)
        (tensor.clone() if self.copies else tensor).mul_(2.0)
        return view.update > 0


def wrapped(policy: Policy, capture: Any = "auto", **options: Any) -> tuple[torch.nn.Parameter, SelectiveUpdate]:
    p = torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(4, 3))
    p.grad = torch.linspace(-2, 1, 12).reshape(4, 3)
    return p, SelectiveUpdate(torch.optim.AdamW([p], lr=0.1), policy=policy, capture=capture, **options)


@pytest.mark.parametrize("on", TENSORS)
@pytest.mark.parametrize("capture", ["fused", "scratch", "delta"])
def test_it_is_found_in_the_first_step(capture: str, on: str) -> None:
    p, optimizer = wrapped(Writes(on=on), capture)
    before = p.detach().clone()
    words = rf"Writes: mask\(\) wrote on view\.{on} of parameter '.*'.*view\.{on} \* 2 in the place of view\.{on}\.mul_"
    with pytest.raises(PolicyError, match=words):
        optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("capture", ["fused", "scratch", "delta"])
def test_it_is_found_in_rotated_parameters(capture: str) -> None:
    _, optimizer = wrapped(Writes(), capture, preconditioner=Eigenbasis(refresh_every=1))
    with pytest.raises(PolicyError, match=r"wrote on view\.update"):
        optimizer.step()


@pytest.mark.parametrize("on", TENSORS)
@pytest.mark.parametrize("capture", ["fused", "scratch", "delta"])
def test_a_copy_may_be_written_on(capture: str, on: str) -> None:
    p, optimizer = wrapped(Writes(on=on, copies=True), capture)
    before = p.detach().clone()
    optimizer.step()
    optimizer.step()
    assert not torch.equal(p, before)


class WritingSelection(Selection):
    def select(self, view: StepView) -> Tensor:
        return view.update.abs_() > 0.5


def test_it_is_found_in_a_selection_of_ones_own() -> None:
    _, optimizer = wrapped(Policy(selection=WritingSelection(), strength=Fixed()))
    with pytest.raises(PolicyError, match=r"wrote on view\.update"):
        optimizer.step()
