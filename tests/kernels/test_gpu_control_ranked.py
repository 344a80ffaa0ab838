"""The control of an exact top-K that draws in the pass that counts the scores, against one that ranks them before."""

from __future__ import annotations

import pytest
import torch
from gpu_control import controlled
from gpu_support import (
    assert_same_step,
    assert_same_sums,
    copied,
    few_samples,
    made,
    missing_brackets,
    rule_on,
    short_lists,
)
from step_cases import RULES

from selective.kernels import Draw, Item, Selection, Strength, Sums, selective_step
from selective.kernels.gpu import control, launch

ADAM = RULES["adamw"]
STRENGTH = Strength("fixed", 1.5, 0.25)


def stepped(start: list[Item], device: str, fraction: float) -> tuple[list[Item], list[Sums], list[str]]:
    """One step of copies, their sums, and the names of the kernels that it took."""
    items = [copied(item, device) for item in start]
    names: list[str] = []
    run = launch.run

    def noted(kernel, *arguments, **constants):
        names.append(kernel.fn.__name__)
        run(kernel, *arguments, **constants)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "run", noted)
        selection = controlled(Selection("top_k", fraction=fraction))
        sums = selective_step(items, rule=rule_on(ADAM, device), selection=selection, strength=STRENGTH,
                              draw=Draw(7, 3), statistics=True, backend="gpu")  # fmt: skip
    return items, list(sums), names


TROUBLES = {"none": 0.4, "missed": 0.4, "short lists": 0.4, "NaN": 0.9, "dense": 0.0005}


SLOW = ("missed", "NaN", "dense")


@pytest.mark.parametrize("trouble", [pytest.param(t, marks=[pytest.mark.slow] if t in SLOW else []) for t in TROUBLES])
def test_one_look_is_the_same_step_as_two(trouble, device, monkeypatch):
    """The same coordinates; multipliers to rounding, since their sums are added up in another order."""
    few_samples(monkeypatch)
    start = [made(ADAM, (n,), seed=seed, address=seed) for seed, n in enumerate((1400, 200))]
    if trouble == "NaN":  # fewer than K scores are numbers, of the large tensor and of the small one
        for item in start:
            item.grad[::5] = torch.nan
    elif trouble == "missed":
        missing_brackets(monkeypatch)
    elif trouble == "short lists":
        start[0].grad[:900] = 0  # ties
        short_lists(monkeypatch)
    found, sums, names = stepped(start, device, TROUBLES[trouble])
    monkeypatch.setattr(control, "RANK_AND_DRAW", False)
    wanted, other_sums, other_names = stepped(start, device, TROUBLES[trouble])
    for ours, theirs, of, before in zip(found, wanted, (*zip(sums, other_sums, strict=True),), start, strict=True):
        assert_same_step(before, ours, copied(theirs, "cpu"), trouble)
        assert_same_sums(*of, trouble)
    assert (names.count("selective_step_kernel"), other_names.count("selective_step_kernel")) == (1, 2)


def test_without_what_was_settled_the_multipliers_are_others(device, monkeypatch):
    """The failing twin: the policy's sums lack what was undecided when they were formed."""
    few_samples(monkeypatch)
    monkeypatch.setattr(launch, "WIDTH", 40.0)  # nearly everything is undecided
    start = [made(ADAM, (1400,), seed=1)]
    (right,), _, _ = stepped(start, device, 0.4)
    empty = launch.Step.empty
    monkeypatch.setattr(launch.Step, "empty", lambda self, *how: empty(self, *how).zero_())
    run = launch.run

    def all_but_settle(kernel, *arguments, **constants):
        if kernel.fn.__name__ != "settle_kernel":
            run(kernel, *arguments, **constants)

    monkeypatch.setattr(launch, "run", all_but_settle)
    (wrong,), _, _ = stepped(start, device, 0.4)
    with pytest.raises(AssertionError, match="of the bound"):
        assert_same_step(start[0], wrong, copied(right, "cpu"))
