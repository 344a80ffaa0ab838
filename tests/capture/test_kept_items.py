"""Items are kept from step to step: whatever is changed in between is noticed, and nothing of it is kept too long.

Each change is made to two optimizers; one of them forgets everything between its steps.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from changes import (
    CHANGES,
    SHAPES,
    a_hook,
    a_hook_that_replaces_state,
    base_checkpoint,
    betas_in_place,
    build,
    deleted_state,
    hyper_parameter,
    members,
    other_checkpoint,
    other_dtype,
    other_order,
    other_parameter,
    other_policy,
    other_state,
    state_in_another_order,
    step,
)

from selective import MGUP, Dense, Magma, SelectiveUpdate, Soap
from selective.capture import items, kernel_calls
from selective.kernels import spec
from selective.plan.group_params import GroupParams
from selective.plan.groups import Groups
from selective.state.store import StateStore
from selective.step import run

STEPS = 6
CHANGE_AT = 3


def trained(change: Callable[[SelectiveUpdate], None], forgetful: bool) -> dict[str, Any]:
    """Parameters, state and statistics after some steps with a change in between."""
    optimizer = build()
    for number in range(STEPS):
        if number == CHANGE_AT:
            change(optimizer)
        if forgetful:
            known = optimizer.groups
            optimizer.groups = Groups(known.base, known.options, known.default, known.policies, known.choices())
        step(optimizer, number)
    params = members(optimizer)
    states = [dict(optimizer.state[p]) for p in params]  # state_dict() refuses what a removed parameter leaves behind
    return {"params": [p.detach() for p in params], "states": states, "statistics": optimizer.statistics()}


def same(a: Any, b: Any) -> bool:
    try:
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change: Callable[[SelectiveUpdate], None]) -> None:
    assert same(trained(change, forgetful=False), trained(change, forgetful=True))


def blind_to_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "is_", lambda a, b: True)


def blind_to_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupParams, "are_of", lambda self, group, address: len(self.tensors) == len(group["params"]))


def blind_to_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, real = items.DeviceItems, items.DeviceItems.take
    monkeypatch.setattr(kept, "take", lambda self: real(self) if self.items[0].grad is self.items[0].param else None)
    monkeypatch.setattr(kept, "let_go", lambda self: None)


def blind_to_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StateStore, "token_of_base", lambda self: StateStore)


def blind_to_code_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_runs_code_of_others", lambda part: False)


def blind_to_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Groups, "_are_as_before", lambda self: self._settled)


@pytest.mark.parametrize(
    ("change", "blind"),
    [
        (other_state, blind_to_states),
        (base_checkpoint, blind_to_states),
        (other_parameter, blind_to_edits),
        (other_order, blind_to_edits),
        (hyper_parameter, blind_to_gradients),
        (other_state, blind_to_the_table),
        (deleted_state, blind_to_the_table),
        (state_in_another_order, blind_to_the_table),
        (a_hook_that_replaces_state, blind_to_code_of_others),
        (betas_in_place, blind_to_states),
        (other_order, blind_to_plans),
        (other_policy, blind_to_plans),
        (a_hook, blind_to_gradients),
    ],
)
def test_the_comparison_would_catch_a_step_that_does_not_look(change, blind, monkeypatch: pytest.MonkeyPatch) -> None:
    right = trained(change, forgetful=True)
    blind(monkeypatch)
    assert not same(trained(change, forgetful=False), right)


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[spec.ItemList]:
    """The lists that the kernel gets, in order; each has a cache that must never be copied."""
    found: list[spec.ItemList] = []
    real = kernel_calls.selective_steps

    def watched(calls: list[spec.StepCall]) -> Any:
        for call in calls:
            assert isinstance(call.items, spec.ItemList)
            call.items.cache["upload_hyperparameters"] = lambda *specs: None  # a local function can't be pickled
            found.append(call.items)
        return real(calls)

    monkeypatch.setattr(kernel_calls, "selective_steps", watched)
    return found


@pytest.mark.parametrize("change", [other_state, other_checkpoint, base_checkpoint, other_dtype])
def test_the_same_lists_are_handed_in_while_nothing_changes(change, handed: list[spec.ItemList]) -> None:
    optimizer = build()
    for number in range(3):
        step(optimizer, number)
    first = handed[:2]
    assert [id(given) for given in handed] == [id(given) for given in first] * 3
    change(optimizer)
    handed.clear()
    step(optimizer, 3)
    assert not any(a is b for a, b in zip(first, handed, strict=True))


def test_hyper_parameters_and_gradients_leave_the_lists_as_they_are(handed: list[spec.ItemList]) -> None:
    optimizer = build()
    step(optimizer, 0)
    optimizer.policy_groups[0]["smoothing"] = 0.2
    optimizer.param_groups[0]["lr"] = 0.01
    step(optimizer, 1)
    assert [id(given) for given in handed[:2]] == [id(given) for given in handed[2:]]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_steps_as_the_original_and_has_lists_of_its_own(copied, handed: list[spec.ItemList]) -> None:
    optimizer = build(Magma())
    step(optimizer, 0)
    other = copied(optimizer)
    handed.clear()
    step(optimizer, 1)
    step(other, 1)
    assert same([p.detach() for p in members(optimizer)], [p.detach() for p in members(other)])
    assert same(optimizer.state_dict(), other.state_dict())
    assert len({id(given) for given in handed}) == 4
    assert handed[0] is not handed[2]


def test_gradients_are_free_after_the_step() -> None:
    optimizer = build()
    step(optimizer, 0)
    grads = [weakref.ref(p.grad) for p in members(optimizer) if p.grad is not None]
    optimizer.zero_grad()
    assert len(grads) == len(SHAPES)
    assert not any(ref() is not None for ref in grads)


def test_replaced_state_is_free_after_loading() -> None:
    optimizer = build()
    step(optimizer, 0)
    moments = [weakref.ref(optimizer.base.state[p]["exp_avg"]) for p in members(optimizer)]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    gc.collect()
    assert not any(ref() is not None for ref in moments)


@pytest.mark.parametrize("space", [None, Soap(refresh_every=2)], ids=["fused", "rotated"])
def test_replaced_state_is_free_where_gradients_are_missing(space: Any) -> None:
    """Of a group that has none, and of one that is not stepped in stacks because of a member that has none."""
    first, second, other = (torch.nn.Parameter(torch.randn(8, 6)) for _ in range(3))
    groups = [{"params": [first, second]}, {"params": [other], "lr": 0.1}]
    optimizer = SelectiveUpdate(torch.optim.AdamW(groups, lr=0.01), policy=MGUP(), preconditioner=space)

    def step(*there: torch.nn.Parameter) -> None:
        for p in (first, second, other):
            p.grad = torch.randn_like(p) if any(p is q for q in there) else None
        optimizer.step()

    for _ in range(3):
        step(first, second, other)
    moment = weakref.ref(optimizer.base.state[first]["exp_avg"])
    optimizer.base.state[first] = {key: value.clone() for key, value in optimizer.base.state[first].items()}
    for _ in range(2):
        step(*((other,) if space is None else (first, other)))
    gc.collect()
    assert moment() is None


@pytest.mark.parametrize("policy", [MGUP(), Dense()], ids=repr)
@pytest.mark.parametrize("space", [None, Soap(refresh_every=2)], ids=["plain", "rotated"])
@pytest.mark.parametrize("capture", ["fused", "scratch", "delta"])
def test_a_policy_is_asked_for_its_parts_once(
    monkeypatch: pytest.MonkeyPatch, capture: Any, space: Any, policy: Any
) -> None:
    """It is frozen, and it makes them anew whenever it is asked. Another policy object is asked again."""
    asked: list[type] = []
    for cls in (MGUP, Dense):
        monkeypatch.setattr(cls, "parts", lambda self, real=cls.parts: (asked.append(type(self)), real(self))[1])
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (5,))]
    base = torch.optim.AdamW(params) if capture == "fused" else torch.optim.NAdam(params)
    optimizer = SelectiveUpdate(base, policy=policy, preconditioner=space, capture=capture)
    counts = []
    for number in range(5):
        if number == 3:
            optimizer.policy_groups[0].policy = type(policy)()
        asked.clear()
        step(optimizer, number)
        counts.append(len(asked))
    assert counts[2] == counts[4] == 0
    assert counts[3] > 0 or (isinstance(policy, Dense) and space is None)


def test_a_group_on_two_devices_has_a_list_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[list[spec.Item]] = []

    def watched(calls: list[spec.StepCall]) -> list[None]:
        handed.extend(list(call.items) for call in calls)
        return [None] * len(calls)

    monkeypatch.setattr(kernel_calls, "selective_steps", watched)
    params = [torch.nn.Parameter(torch.zeros(i + 1, device=d)) for i, d in enumerate(("cpu", "meta", "cpu"))]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = SelectiveUpdate(torch.optim.AdamW(params), policy=MGUP(), statistics=False)
    optimizer.step()
    assert [[item.param for item in given] for given in handed] == [[params[0], params[2]], [params[1]]]
    assert [[item.address for item in given] for given in handed] == [[0, 2], [1]]
