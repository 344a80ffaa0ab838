"""The plans of parameter groups, without an optimizer around them: what a refresh keeps, and what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parts import groups_of, two_groups

from selective import Cautious, Dense, SelectiveUpdate, Soap
from selective.plan.groups import Groups


def test_nothing_is_made_anew_while_nothing_changes() -> None:
    groups = groups_of(two_groups())
    groups.update()
    before = [(plan, plan.choice, plan.params) for plan in groups.plans]
    assert groups.update() == ([], None)
    assert all(
        plan is known and plan.choice is choice and plan.params is params
        for plan, (known, choice, params) in zip(groups.plans, before, strict=True)
    )


def test_a_group_of_the_base_is_taken_in() -> None:
    base = two_groups()
    groups = groups_of(base)
    groups.update()
    base.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "policy": None})
    groups.update()
    assert [plan.number for plan in groups.plans] == [0, 1, 2]
    assert [parameter.address for plan in groups.plans for parameter in plan.params.parameters] == [0, 1, 2]
    assert groups.plans[2].is_dense and groups.plans[2].capture.way == "dense"
    assert "policy" not in base.param_groups[2]


def test_a_switched_policy_is_said_once() -> None:
    groups = groups_of(two_groups())
    groups.update()
    groups.policies[1].policy = Cautious()
    assert groups.update().switched == [groups.plans[1]]
    assert groups.update().switched == []


@pytest.mark.parametrize("looked", [False, True], ids=["at once", "looked at in between"])
def test_a_group_that_is_removed_is_no_switch_of_the_next_one(looked: bool) -> None:
    """As it was: the next one stood at the place of the removed one, under a policy of another class."""
    base = two_groups()
    groups = groups_of(base, Soap())
    groups.policies += [groups.take_in(group) for group in [{"policy": Cautious()}, {}]]
    groups.update()
    plan, (vector,) = groups.plans[1], base.param_groups[1]["params"]
    del base.param_groups[0]
    if looked:
        groups.update_plans()
    del groups.policies[0]
    changes = groups.update()
    assert changes.switched == [] and changes.remaining == {vector}
    assert groups.plans == [plan] and plan.number == 0
    (parameter,) = plan.params.parameters
    assert (parameter.group, parameter.address, parameter.name) == (0, 0, "param_groups[0][0]")


def test_policies_that_change_places_are_switched() -> None:
    groups = groups_of(two_groups())
    groups.policies += [groups.take_in(group) for group in [{"policy": Cautious()}, {}]]
    groups.update()
    groups.policies.reverse()
    assert groups.update().switched == groups.plans


def test_copies_know_what_was_switched_before_them() -> None:
    groups = groups_of(two_groups())
    groups.update()
    groups.policies[0].policy = Dense()
    copied = Groups(groups.base, groups.options, groups.default, groups.policies, groups.choices())
    assert copied.update().switched == [copied.plans[0]]


def test_parameters_that_are_gone_are_said_and_forgotten() -> None:
    base = two_groups()
    groups = groups_of(base, Soap())
    groups.update()
    (matrix,), (vector,) = (group["params"] for group in base.param_groups)
    assert list(groups.places) == [matrix]
    base.param_groups[0]["params"] = [torch.nn.Parameter(torch.ones(2, 3))]
    there = groups.update().remaining
    assert there is not None and matrix not in there and vector in there
    assert matrix not in groups.places and len(groups.places) == 1


def test_a_basis_that_is_kept_can_not_become_another() -> None:
    base = two_groups()
    groups = groups_of(base, Soap())
    groups.update()
    groups.policies[0].preconditioning.preconditioner = None
    with pytest.raises(ValueError, match="another kind"):
        groups.update(with_basis=set(groups.places))
    groups.update(with_basis=set())
    assert groups.plans[0].rotation is None


def test_an_undone_refresh_says_its_switch_again() -> None:
    groups = groups_of(two_groups())
    groups.update()
    undo = groups.snapshot()
    policy = groups.policies[0].policy
    groups.policies[0].policy = Cautious()
    groups.update()
    undo()
    assert groups.policies[0].policy is policy
    assert groups.update().switched == []
    groups.policies[0].policy = Cautious()
    assert groups.update().switched == [groups.plans[0]]


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
def test_numbers_that_a_scheduler_writes_are_no_reason_to_decide_again(base: Any, monkeypatch) -> None:
    """OneCycleLR writes another rate, and other betas or another momentum, in every step."""
    p, calls = torch.nn.Parameter(torch.ones(3)), []
    numbers = {"lr": 0.1, "weight_decay": 0.1} | ({"momentum": 0.9} if base is torch.optim.SGD else {})
    optimizer = SelectiveUpdate(base([p], **numbers), policy=Cautious())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=9)
    real = Groups.update_plans

    def counted(groups: Groups) -> Any:
        calls.append(groups)
        return real(groups)

    def step() -> int:
        p.grad = torch.ones(3)
        calls.clear()
        optimizer.step()
        scheduler.step()
        return len(calls)

    step()
    monkeypatch.setattr(Groups, "update_plans", counted)
    assert [step() for _ in range(3)] == [0, 0, 0]
    optimizer.param_groups[0]["weight_decay"] = 0.2
    assert step() == 0
    optimizer.param_groups[0]["weight_decay"] = 0.0
    assert step() == 1
    optimizer.param_groups[0]["maximize"] = True
    assert [step(), step()] == [1, 0]


def test_a_group_that_is_refused_keeps_all_that_it_says() -> None:
    """As it was: it had lost its policy, and was dense when the other key was mended."""
    base = two_groups()
    groups = groups_of(base)
    groups.update()
    base.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "policy": "Cautious", "preconditioner": "no"})
    with pytest.raises(ValueError, match="'no'"):
        groups.update()
    base.param_groups[2]["preconditioner"] = None
    groups.update()
    assert groups.policies[2].policy == Cautious()
    assert not {"policy", "preconditioner"} & base.param_groups[2].keys()
