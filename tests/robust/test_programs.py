"""Random programs: whatever is wrapped and whatever is done with it in whichever order, the promises hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from program_run import SEEN, run
from programs import Made, beginnings, params_of, programs

from selective import Dense, Fixed, Policy, RandomMask, SelectiveUpdate, Soap, TopK
from selective.state.parameter_state import OwnEntries

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


@given(made=beginnings(), program=programs)
@settings(max_examples=100, deadline=None, suppress_health_check=SLOW)
def test_programs(made: Made, program: list[Any]) -> None:
    run(made, program)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@given(made=beginnings(), program=programs)
@settings(max_examples=2500, deadline=None, suppress_health_check=SLOW)
def test_programs_at_length(made: Made, program: list[Any]) -> None:
    run(made, program)


def test_programs_reach_what_they_are_for() -> None:
    """Twins and top-K are compared indeed."""
    made = Made(
        [(4, 3), (6,)], [torch.float32] * 2, [True, False], "adamw",
        [RandomMask(), Policy(selection=TopK(), strength=Fixed())], 1,
        Soap(refresh_every=2), {"statistics": True, "seed": 7},
    )  # fmt: skip
    program: list[Any] = [("step", 0), ("step", 2), ("reload",), ("schedule",), ("step", 0), ("copy", "deepcopy")]
    before = dict(SEEN)
    run(made, program)
    assert SEEN["twins"] == before["twins"] + 4
    assert SEEN["top-k"] > before["top-k"]


def forgets_the_step(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("selective.checkpoint.load.step_and_seed_of", lambda ours, order: {})


def forgets_the_basis(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("selective.checkpoint.load.own_tensors", lambda entries, p: OwnEntries())


def moves_all(patch: pytest.MonkeyPatch) -> None:
    step = SelectiveUpdate.step

    def moved(self: SelectiveUpdate, closure: Any = None) -> Any:
        with torch.no_grad():
            params_of(self)[-1].add_(1e-3)
        return step(self, closure)

    patch.setattr(SelectiveUpdate, "step", moved)


def draws_globally(patch: pytest.MonkeyPatch) -> None:
    explain = SelectiveUpdate.explain
    patch.setattr(SelectiveUpdate, "explain", lambda self: f"{explain(self)}{torch.rand(1)}")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (forgets_the_step, "step"),
        (forgets_the_basis, "selective"),
        (moves_all, "moved without a gradient"),
        (draws_globally, "global generator"),
    ],
)
def test_what_breaks_a_promise_is_noticed(spoil: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(
        [(4, 3), (6,)], [torch.float32] * 2, [True, False], "adamw", [RandomMask(), Dense()], 1,
        Soap(refresh_every=2), {"statistics": True, "seed": 7},
    )  # fmt: skip
    state = torch.get_rng_state()
    spoil(monkeypatch)
    with pytest.raises(AssertionError, match=says):
        run(made, [("step", 0), ("step", 2), ("reload",), ("read",), ("step", 0)])
    torch.set_rng_state(state)
