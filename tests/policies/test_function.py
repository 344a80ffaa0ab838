"""A function of a view as a policy: its mask, what it reads, checkpoints, copies, and its name in texts."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from selective import Dense, Policy, PolicyError, SelectiveUpdate, StepView, policy_from
from selective.testing import check_policy


def agreeing(view: StepView) -> Tensor:
    return view.momentum * view.grad > 0


def scaled(view: StepView, by: float) -> Tensor:
    return torch.full_like(view.update, by)


class Agreeing(Policy):
    reads = frozenset({"momentum", "grad", "update"})

    def mask(self, view: StepView) -> Tensor:
        return agreeing(view)


def wrapped(policy: Any) -> tuple[torch.nn.Parameter, SelectiveUpdate]:
    p = torch.nn.Parameter(torch.ones(2, 3))
    return p, SelectiveUpdate(torch.optim.AdamW([p], lr=0.1), policy=policy)


def train(p: torch.nn.Parameter, optimizer: SelectiveUpdate, steps: range) -> None:
    for step in steps:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()


def test_it_trains_as_the_same_mask_in_a_class_does() -> None:
    (p, optimizer), (expected, by_class) = wrapped(agreeing), wrapped(Agreeing())
    train(p, optimizer, range(4))
    train(expected, by_class, range(4))
    assert torch.equal(p, expected) and not torch.equal(p, torch.ones(2, 3))


def test_it_reads_what_its_code_names() -> None:
    assert policy_from(agreeing).needs() == {"update", "grad", "momentum"}
    assert policy_from(functools.partial(scaled, by=2.0)).needs() == {"update", "grad"}
    inner = policy_from(lambda view: (lambda: view.param * view.previous_momentum > 0)())
    assert inner.needs() == {"update", "grad", "param", "previous_momentum"}

    def passes_it_on(view: StepView) -> Tensor:
        return agreeing(view)

    p, optimizer = wrapped(passes_it_on)
    with pytest.raises(PolicyError, match=r"passes_it_on: view\.momentum was read but is not declared"):
        train(p, optimizer, range(1))


def test_it_is_called_by_its_name() -> None:
    p, optimizer = wrapped(agreeing)
    assert "policy    agreeing\n" in optimizer.explain() and repr(optimizer).endswith("policy=agreeing)")
    assert list(optimizer.policy_groups[0]) == []
    assert policy_from(agreeing) == policy_from(agreeing) != policy_from(functools.partial(scaled, by=1.0))
    check_policy(policy_from(agreeing))

    def fails(view: StepView) -> Tensor:
        raise ZeroDivisionError("of the user's")

    p, optimizer = wrapped(fails)
    with pytest.raises(PolicyError, match="fails failed in step 0: of the user's"):
        train(p, optimizer, range(1))


def test_a_group_takes_one_and_a_setter_does() -> None:
    p = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = SelectiveUpdate(torch.optim.AdamW([{"params": [p], "policy": agreeing}], lr=0.1))
    assert optimizer.policy_groups[0].policy == policy_from(agreeing)
    optimizer.policy_groups[0].policy = None
    assert optimizer.policy_groups[0].policy == Dense()
    optimizer.policy_groups[0].policy = functools.partial(scaled, by=0.0)
    train(p, optimizer, range(2))
    decayed = torch.ones(2, 3).mul(1 - 0.1 * 0.01).mul(1 - 0.1 * 0.01)  # decay alone, rounded after each step
    assert torch.equal(p, decayed)


def test_a_run_resumes_with_the_same_function_and_no_other() -> None:
    p, optimizer = wrapped(agreeing)
    train(p, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    resumed, again = wrapped(agreeing)
    with torch.no_grad():
        resumed.copy_(p)
    again.load_state_dict(saved)
    train(p, optimizer, range(3, 5))
    train(resumed, again, range(3, 5))
    assert torch.equal(p, resumed)
    for other, words in (
        (lambda view: view.grad > 0, "policy <lambda>, the checkpoint was made with agreeing"),
        ("MGUP", "agreeing"),
    ):
        with pytest.raises(ValueError, match=words):
            wrapped(other)[1].load_state_dict(saved)


def test_a_checkpoint_takes_the_function_of_its_own_group() -> None:
    """Two functions of one name: each optimizer goes on with the one that it was built with."""
    first, second = (lambda view: view.grad > 0), (lambda view: view.grad < 0)
    p, optimizer = wrapped(first)
    train(p, optimizer, range(1))
    wrapped(second)  # the last one of this name
    _, again = wrapped(first)
    again.load_state_dict(optimizer.state_dict())
    assert again.policy_groups[0].policy == policy_from(first) != policy_from(second)
    again.state[again.param_groups[0]["params"][0]]["selective/policy"] = optimizer.state[p]["selective/policy"]
    assert again.policy_groups[0].policy == policy_from(first)


def test_a_function_that_is_not_there_is_asked_for() -> None:
    with pytest.raises(
        ValueError, match=r"the function 'gone', which no data holds; build the optimizer with policy=gone"
    ):
        policy_from('{"kind": "function gone"}')


def test_copies_and_pickles_have_the_same_function() -> None:
    p, optimizer = wrapped(agreeing)
    train(p, optimizer, range(1))
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.policy_groups[0].policy == policy_from(agreeing)
        train(twin.param_groups[0]["params"][0], twin, range(1, 2))


@pytest.mark.parametrize("function", [scaled, lambda: None])
def test_a_function_of_something_else_is_refused(function: Any) -> None:
    with pytest.raises(TypeError, match="can't be called with a view alone"):
        policy_from(function)
