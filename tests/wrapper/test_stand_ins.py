"""Objects that stand in for the optimizer: of a class derived from ours, they look up on it what they do not have."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from selective import MGUP, Cautious, Eigenbasis, SelectiveUpdate
from selective.state.entries import BASIS_STEPS, STEP


class LooksUp:
    """As Lightning Fabric's wrapper does it since version 2.2."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.__class__ = type("Fabric" + type(optimizer).__name__, (type(self), type(optimizer)), {})

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


class CopiesAttributes(LooksUp):
    """As it did before: what the optimizer has is copied once."""

    def __init__(self, optimizer: Any) -> None:
        self.__dict__.update({k: v for k, v in vars(optimizer).items() if k not in ("state_dict", "step")})
        super().__init__(optimizer)


def make() -> SelectiveUpdate:
    params = [torch.nn.Parameter(torch.ones(4, 3)), torch.nn.Parameter(torch.ones(4))]
    return SelectiveUpdate(torch.optim.AdamW(params, lr=0.1), policy=MGUP(), preconditioner=Eigenbasis(refresh_every=2))


def step(optimizer: Any, number: int) -> None:
    for seed, p in enumerate(optimizer.param_groups[0]["params"]):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * number + seed))
    optimizer.step()


@pytest.mark.parametrize("kind", [LooksUp, CopiesAttributes])
def test_reading_it_counts_the_steps(kind: Any) -> None:
    optimizer = make()
    wrapped: Any = kind(optimizer)
    matrix = optimizer.param_groups[0]["params"][0]
    for number in range(4):
        assert int(wrapped.state[matrix].get(STEP, 0)) == number
        assert wrapped.explain() == optimizer.explain()
        step(wrapped, number)
        for one in (wrapped, optimizer):
            assert int(one.state[matrix][STEP]) == number + 1
            assert int(one.state[matrix][BASIS_STEPS]) == number + 1
            assert int(one.state_dict()["state"][0][STEP]) == number + 1
        assert wrapped.statistics().keys() == optimizer.statistics().keys() != set()


@pytest.mark.parametrize("kind", [LooksUp, CopiesAttributes])
def test_what_is_changed_on_one_is_changed_on_the_other(kind: Any) -> None:
    """A load, a switched policy, another group: on whichever of the two, both go on with it."""
    optimizer, other = make(), make()
    wrapped: Any = kind(optimizer)
    for number in range(3):
        step(other, number)
    saved = copy.deepcopy(other.state_dict())
    wrapped.load_state_dict(saved)
    matrix = optimizer.param_groups[0]["params"][0]
    assert int(optimizer.state[matrix][STEP]) == int(wrapped.state[matrix][STEP]) == 3
    wrapped.policy_groups[0].policy = Cautious()
    step(wrapped, 3)
    wrapped.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    step(wrapped, 4)
    assert int(optimizer.state[matrix][STEP]) == int(wrapped.state[matrix][STEP]) == 5
    assert optimizer.explain() == wrapped.explain()
    assert "Cautious" in optimizer.explain()


def test_an_assigned_count_would_be_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault as it was: an attribute that a property assigns becomes the stand-in's own."""
    state: Any = SelectiveUpdate.state

    def assigning(self: Any) -> Any:
        self.count = copy.copy(self.count)
        return state.fget(self)

    monkeypatch.setattr(SelectiveUpdate, "state", property(assigning, state.fset))
    optimizer = make()
    wrapped: Any = LooksUp(optimizer)
    matrix = optimizer.param_groups[0]["params"][0]
    step(wrapped, 0)
    assert int(wrapped.state[matrix][STEP]) == 1
    step(wrapped, 1)
    assert int(wrapped.state[matrix][STEP]) == 1
    assert int(optimizer.state[matrix][STEP]) == 2


def test_copies_are_their_own() -> None:
    """A copy shares nothing that an optimizer shares with its stand-in."""
    optimizer = make()
    step(optimizer, 0)
    copied = copy.deepcopy(optimizer)
    step(copied, 1)
    for one, count in ((optimizer, 1), (copied, 2)):
        assert int(one.state[one.param_groups[0]["params"][0]][STEP]) == count
