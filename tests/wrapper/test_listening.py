"""Hyper-parameters of a policy that are set between replays of a CUDA graph reach the tables on the device at once."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from selective import MGUP, Cautious, Policy, SelectiveUpdate
from selective.plan.policy_groups import PolicyGroup
from selective.policies.kernel_terms import specs_of
from selective.policies.selections import TopK
from selective.policies.strengths import Fixed


class OwnCode(MGUP):
    def mask(self, view: Any) -> torch.Tensor:
        return torch.ones_like(view.update)


def stepped(policy: Policy) -> tuple[SelectiveUpdate, list[Any]]:
    """An optimizer after one step, and what its only table is told."""
    p = torch.nn.Parameter(torch.zeros(4, 4))
    p.grad = torch.ones(4, 4)
    optimizer = SelectiveUpdate(torch.optim.AdamW([p]), policy=policy)
    optimizer.step()
    told: list[Any] = []
    optimizer.groups.plans[0].kept._lists[0].items.cache["upload_hyperparameters"] = lambda *specs: told.append(specs)
    return optimizer, told


def test_a_set_hyper_parameter_is_told_at_once() -> None:
    optimizer, told = stepped(MGUP(alpha=1.5))
    optimizer.policy_groups[0]["alpha"] = 1.2
    assert told == [specs_of(MGUP(alpha=1.2))]
    optimizer.policy_groups[0].policy = MGUP(tau=0.3)
    assert told[1:] == [specs_of(MGUP(tau=0.3))]


def test_nested_hyper_parameters_are_told() -> None:
    optimizer, told = stepped(Policy(selection=TopK(fraction=0.5), strength=Fixed()))
    optimizer.policy_groups[0]["selection.fraction"] = 0.25
    ((selection, _),) = told
    assert selection.fraction == 0.25


def test_a_checkpoints_hyper_parameters_are_told_to_what_was_recorded() -> None:
    optimizer, told = stepped(MGUP(alpha=1.5))
    checkpoint = copy.deepcopy(optimizer.state_dict())
    optimizer.policy_groups[0]["alpha"] = 1.2
    optimizer.load_state_dict(checkpoint)
    assert told[-1] == specs_of(MGUP(alpha=1.5))


@pytest.mark.parametrize(("before", "after"), [(MGUP(), Cautious()), (OwnCode(), OwnCode(tau=0.3))], ids=repr)
def test_another_kind_or_own_code_is_not_told(before: Policy, after: Policy) -> None:
    optimizer, told = stepped(before)
    optimizer.policy_groups[0].policy = after
    assert told == []


def test_a_value_that_is_refused_is_not_told() -> None:
    optimizer, told = stepped(MGUP())
    with pytest.raises(ValueError, match="tau"):
        optimizer.policy_groups[0]["tau"] = 2.0
    assert told == []


def test_listeners_are_not_copied() -> None:
    told: list[Policy] = []
    group = PolicyGroup(MGUP())
    group.listen(told.append)
    for other in (copy.deepcopy(group), pickle.loads(pickle.dumps(PolicyGroup(MGUP())))):
        other["tau"] = 0.3
        assert other.policy == MGUP(tau=0.3)
    assert told == []
    group.policy = Cautious()
    assert told == [Cautious()]
