"""`check_policy`: every named policy keeps the contract, and for each clause there is one that breaks it."""

from __future__ import annotations

import random
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field

from selective import (
    MGUP,
    Agreement,
    AlphaConsistency,
    Bernoulli,
    Cautious,
    CautiousMGUP,
    Dense,
    Everything,
    Fixed,
    Grams,
    Magma,
    MeanPreserving,
    NormPreserving,
    Policy,
    RandomMask,
    Selection,
    SkipUpdate,
    TopK,
)
from selective.testing import CheckFailed, check_policy, policy_checks


class Half(Policy):
    """The custom policy of the documentation."""

    kind: ClassVar[str] = "contract-half"
    rest: float = Field(0.5, ge=0, le=1)

    def mask(self, view: Any) -> Any:
        return torch.where(view.update * view.grad > 0, 1.0, self.rest)


class Smoothed(Half):
    """With state: the mask is the average of what it was."""

    kind: ClassVar[str] = "contract-smoothed"

    def init_state(self, view: Any) -> Any:
        return {"average": torch.ones(view.shape)}

    def mask(self, view: Any) -> Any:
        average = 0.9 * view.state["average"] + 0.1 * super().mask(view)
        return average, {"average": average}


GOOD = [
    AlphaConsistency(), Cautious(), CautiousMGUP(), Dense(), Grams(), MGUP(), Magma(), RandomMask(), SkipUpdate(),
    RandomMask.matching(MGUP()), Half(), Smoothed(rest=0.25), MGUP(tau=0.3, alpha=2, gamma=0.1, score="nesterov"),
    Policy(selection=Everything(), strength=Fixed(selected=0.5)),
    Policy(selection=TopK(fraction=0.3), strength=NormPreserving(of="gradient")),
    Policy(selection=Agreement(momentum="previous", strict=False), strength=MeanPreserving(rest=0.2)),
    Policy(selection=Bernoulli(probability=0.2, unit="row"), strength=NormPreserving(cap=3)),
]  # fmt: skip


@pytest.mark.parametrize("policy", GOOD, ids=repr)
def test_policies_keep_the_contract(policy):
    report = check_policy(policy)
    report.raise_if_failed()
    kernel = "kernel_agrees_with_its_twin"  # tests/policies/test_kernel_selection.py
    assert [o.check for o in report.passed] == [name for name in policy_checks if name != kernel]
    assert [(o.check, o.message) for o in report.not_applicable] == [(kernel, "no selection with a kernel of its own")]


def test_every_policy_of_ours_is_in_the_list():
    ours = {policy for policy in Policy._registry.values() if policy.__module__.startswith("selective.")}
    assert ours - {type(policy) for policy in GOOD} == set()


BROKEN: dict[type[Policy], tuple[str, str]] = {}


def breaks(check: str, words: str) -> Any:
    def add(cls: type[Policy]) -> type[Policy]:
        BROKEN[cls] = (check, words)
        return cls

    return add


@breaks("mask_is_a_multiplier", "torch.int64")
class Counts(Half):
    def mask(self, view):
        return (view.update * view.grad > 0).long()


@breaks("mask_is_a_multiplier", "broadcast")
class FlatMask(Half):
    def mask(self, view):
        return super().mask(view).flatten()


@breaks("mask_is_a_multiplier", "not a tensor")
class Number(Half):
    def mask(self, view):
        return 0.5


@breaks("mask_is_deterministic", "called again")
class Remembers(Half):
    seen: ClassVar[list[int]] = []

    def mask(self, view):
        self.seen.append(1)
        return super().mask(view) / len(self.seen)


@breaks("view_is_not_written", "view.grad")
class WritesOnTheGradient(Half):
    def mask(self, view):
        return torch.where(view.grad.mul_(view.update) > 0, 1.0, self.rest)


@breaks("view_is_not_written", "view.state")
class WritesOnItsState(Smoothed):
    def mask(self, view):
        return view.state["average"].mul_(0.9)


@breaks("global_generators_are_left_alone", "moved a global generator")
class DrawsGlobally(Half):
    def mask(self, view):
        return torch.rand(view.shape) < 0.5


@breaks("global_generators_are_left_alone", "another global seed")
class DrawsAndPutsBack(Half):
    def mask(self, view):
        state = random.getstate()
        number = random.random()
        random.setstate(state)
        return super().mask(view) * number


@breaks("declared_reads_suffice", "view.momentum was read but is not declared")
class ReadsMore(Half):
    def mask(self, view):
        return view.momentum * view.grad > 0


@breaks("declared_reads_suffice", "scope is 'shard'")
class WrongScope(Half):
    scope: ClassVar[Any] = "shard"


@breaks("copies_are_equal", "pickle")
class PicklesToAnother(Half):
    def __reduce__(self):
        return PicklesToAnother, ()

    def __eq__(self, other):
        return self is other

    __hash__ = None


@breaks("json_round_trip", "came back as")
class ForgetsInJson(Half):
    rest: float = Field(0.5, ge=0, le=1, exclude=True)


@breaks("state_keeps_its_form", "init_state made")
class StateOfAnyShape(Smoothed):
    def init_state(self, view):
        return {"average": torch.ones(3)}

    def mask(self, view):
        return torch.ones(view.shape)


@breaks("state_keeps_its_form", "another shape or dtype")
class StateOfAnotherDtype(Smoothed):
    def mask(self, view):
        return torch.ones(view.shape), {"average": view.state["average"].double()}


@breaks("degenerate_tensors_are_defined", "NaN or infinity")
class DividesByNothing(Half):
    def mask(self, view):
        selected = (view.update * view.grad > 0).float()
        return selected * (selected.numel() / selected.sum())


@breaks("degenerate_tensors_are_defined", "-0.0 instead of 0.0")
class SeesTheSignOfZero(Half):
    def mask(self, view):
        return torch.where(torch.signbit(view.grad) == torch.signbit(view.update), 1.0, self.rest)


@breaks("nan_stays_where_it_is", "made another tensor NaN")
class MixesTensors(Half):
    total: ClassVar[list[float]] = [0.0]

    def mask(self, view):
        self.total[0] += float(view.grad.sum())
        return torch.ones(view.shape) * (1 + 0 * self.total[0])


@breaks("steps_in_an_optimizer", "no element of a")
class NeverMoves(Half):
    def mask(self, view):
        return torch.zeros(view.shape)


@breaks("steps_in_an_optimizer", "not finite")
class Explodes(Half):
    def mask(self, view):
        return torch.full(view.shape, 3e38) * 10


class TiesOnAGpuOnly(Selection):
    kind: ClassVar[str] = "contract-ties"

    @staticmethod
    def kernel(grad, update, momentum):
        return update * grad >= 0

    def select(self, view):
        return view.update * view.grad > 0


@breaks("kernel_agrees_with_its_twin", "kernel and select() disagree")
class SelectsOtherwiseOnAGpu(Policy):
    rest: float = 0.5

    def parts(self):
        return TiesOnAGpuOnly(), Fixed(rest=self.rest)


@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: cls.__name__)
def test_broken_policy_fails_by_name(cls):
    check, words = BROKEN[cls]
    failed = {o.check: o.message for o in check_policy(cls(rest=0.25)).failed}
    assert check in failed, sorted(failed)
    assert words in failed[check]


def test_every_check_has_a_policy_that_fails_it():
    assert {check for check, _ in BROKEN.values()} == set(policy_checks)


def test_report_of_a_policy_raises_and_reads():
    report = check_policy(NeverMoves())
    assert "steps_in_an_optimizer" in str(report)
    assert "row" not in str(report.failed[0])
    with pytest.raises(CheckFailed, match=r"steps_in_an_optimizer: in six steps"):
        report.raise_if_failed()
    with pytest.raises(TypeError, match="expected a Policy, found a str"):
        check_policy("MGUP")
