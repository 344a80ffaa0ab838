"""The jobs of a step, without an optimizer around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parts import Parts, give_gradients, parts_of, two_groups
from torch import Tensor

from selective import MGUP, Policy, PolicyError, SelectiveUpdate, Soap
from selective.state.entries import BASIS_STEPS
from selective.state.store import follow_changes
from selective.statistics import StepStatistics
from selective.step import run
from selective.step.run import StepRunner


class Fails(Policy):
    def mask(self, view: Any) -> Tensor:
        raise ZeroDivisionError("not this one")


def jobs_of(runner: StepRunner, parts: Parts, report: StepStatistics | None = None) -> Any:
    present = [plan.params.with_gradient() for plan in parts.groups.plans]
    return runner.jobs(parts.groups, present, report, recording=False)


@pytest.mark.parametrize("preconditioner", [None, Soap(refresh_every=2)], ids=["plain", "rotated"])
def test_it_steps_as_the_optimizer_does(preconditioner: Any) -> None:
    parts = parts_of(two_groups(), preconditioner)
    whole = SelectiveUpdate(two_groups(), policy=MGUP(), preconditioner=preconditioner, seed=3)
    runner = StepRunner(parts.groups.options, parts.count, parts.store)
    for number in range(3):
        for base in (parts.base, whole.base):
            give_gradients(base, number)
        whole.step()
        follow_changes(parts.groups, parts.store)
        with torch.no_grad():
            runner.run(jobs_of(runner, parts))
        parts.count.tick([], recording=False)
    for group, theirs in zip(parts.base.param_groups, whole.param_groups, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(group["params"], theirs["params"], strict=True))
    (plan, _), (parameter,) = parts.groups.plans, parts.groups.plans[0].params.parameters
    assert int(parts.store.get_or_make(plan, parameter).get(BASIS_STEPS, 3)) == 3 == parts.count.steps


def test_what_was_selected_is_reported() -> None:
    parts = parts_of(two_groups())
    follow_changes(parts.groups, parts.store)
    give_gradients(parts.base)
    runner, report = StepRunner(parts.groups.options, parts.count, parts.store), StepStatistics()
    with torch.no_grad():
        runner.run(jobs_of(runner, parts, report))
    assert report.read().keys() == {"param_groups[0][0]", "param_groups[1][0]"}


def test_parameters_are_put_back_where_a_policy_raises() -> None:
    parts = parts_of(two_groups())
    parts.groups.default.policy = Fails()
    follow_changes(parts.groups, parts.store)
    give_gradients(parts.base)
    before = [p.detach().clone() for group in parts.base.param_groups for p in group["params"]]
    runner = StepRunner(parts.groups.options, parts.count, parts.store)
    with torch.no_grad(), pytest.raises(PolicyError, match=r"Fails failed in step 0: .*not this one"):
        runner.run(jobs_of(runner, parts))
    after = [p.detach() for group in parts.base.param_groups for p in group["params"]]
    assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))


class Adam2(torch.optim.AdamW):
    """A class of somebody's own, whose step may do anything."""


def with_hook(base: torch.optim.Optimizer) -> None:
    base.register_step_pre_hook(lambda *arguments: None)


def with_a_step_of_its_own(base: Any) -> None:
    base.step = lambda: None


@pytest.mark.parametrize(
    ("cls", "change", "dense", "others"),
    [
        (torch.optim.AdamW, lambda base: None, True, False),
        (torch.optim.AdamW, lambda base: None, False, False),
        (torch.optim.AdamW, with_hook, False, True),
        (torch.optim.AdamW, with_a_step_of_its_own, True, True),
        (Adam2, lambda base: None, True, True),
    ],
    ids=["a known step", "no step", "a hook", "a replaced step", "a subclass"],
)
def test_whose_code_runs_in_a_step_is_known(cls: Any, change: Any, dense: bool, others: bool) -> None:
    """While it is ours or torch's own, what was looked at before the step is not looked at again."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(3))], "policy": "MGUP"}]
    if dense:
        groups.append({"params": [torch.nn.Parameter(torch.ones(3))], "policy": None})
    optimizer = SelectiveUpdate(cls(groups))
    change(optimizer.base)
    follow_changes(optimizer.groups, optimizer.store)
    give_gradients(optimizer.base)
    plans = optimizer.groups.plans
    jobs = optimizer.runner.jobs(optimizer.groups, [plan.params.parameters for plan in plans], None, recording=False)
    assert run._runs_code_of_others(run.Part(optimizer.runner, jobs)) is others
