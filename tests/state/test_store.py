"""The entries that are kept of parameters, without an optimizer around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parts import give_gradients, parts_of, two_groups

from selective import Cautious, Magma, Soap
from selective.state.check_before_step import check_state
from selective.state.entries import BASIS_STEPS, MOMENTUM, POLICY, PRECONDITIONER, SEED, STEP
from selective.state.init_state import make_all_state
from selective.state.store import follow_changes
from selective.state.writing import OptimizerStateBackend


def test_it_is_made_once_and_of_what_is_masked() -> None:
    base, groups, store, _ = parts_of(two_groups(), momentum_beta=0.9)
    groups.policies += [groups.take_in(group) for group in [{"policy": Magma()}, {"policy": None}]]
    follow_changes(groups, store)
    store.make(groups.plans, lambda parameter: True)
    (matrix,) = base.param_groups[0]["params"]
    assert list(store.table) == [matrix]
    (plan, _), (parameter,) = groups.plans, groups.plans[0].params.parameters
    assert store.get_or_make(plan, parameter) is store.table[matrix]
    assert MOMENTUM in store.table[matrix] and store.policy_state(plan, parameter).keys() == {"average"}


def test_entries_of_a_checkpoint_say_what_made_them() -> None:
    base, groups, store, count = parts_of(two_groups(), Soap())
    follow_changes(groups, store)
    count.set(steps=7)
    (plan, _), (parameter,) = groups.plans, groups.plans[0].params.parameters
    saved = store.saved(plan, store.get_or_make(plan, parameter))
    assert {STEP, SEED, POLICY, PRECONDITIONER, BASIS_STEPS} <= saved.keys()
    assert (int(saved[STEP]), int(saved[SEED])) == (7, 3)
    assert parameter.tensor in store.with_basis
    assert base.param_groups[1]["params"][0] not in store.with_basis


def test_a_switched_policy_keeps_the_momentum() -> None:
    _, groups, store, _ = parts_of(two_groups(), momentum_beta=0.9)
    groups.default.policy = Magma()
    follow_changes(groups, store)
    store.make(groups.plans, lambda parameter: True)
    table, (parameter,) = store.table, groups.plans[0].params.parameters
    momentum = table[parameter.tensor][MOMENTUM]
    groups.policies[0].policy = Cautious()
    follow_changes(groups, store)
    assert store.table is not table
    assert store.table[parameter.tensor].keys() == {MOMENTUM}
    assert store.table[parameter.tensor][MOMENTUM] is momentum


def test_a_snapshot_puts_the_table_back() -> None:
    _, groups, store, _ = parts_of(two_groups(), Soap())
    follow_changes(groups, store)
    store.make(groups.plans, lambda parameter: True)
    table, undo = store.table, store.snapshot()
    store.forget_all_but([])
    assert store.table == {}
    undo()
    assert store.table is table


def test_a_basis_that_can_not_be_entered_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    base, groups, store, _ = parts_of(two_groups(), Soap())
    follow_changes(groups, store)
    give_gradients(base)
    base.step()

    def failing(*ignored: Any) -> None:
        raise RuntimeError("not now")

    with monkeypatch.context() as patch:
        patch.setattr("selective.state.store.rotate_moments_into", failing)
        with pytest.raises(RuntimeError, match="not now"):
            store.join_base(groups.plans)
    assert store.table == {}
    store.join_base(groups.plans)
    assert len(store.table) == 2


def test_state_that_does_not_fit_is_refused_before_a_step() -> None:
    base, groups, store, count = parts_of(two_groups())
    follow_changes(groups, store)
    make_all_state(groups.plans, store)
    (matrix,) = base.param_groups[0]["params"]
    check_state(groups.plans, store)
    OptimizerStateBackend(base, groups, store, count).base_state()[matrix]["exp_avg"] = torch.zeros(2, 2)
    check_state(groups.plans, store)  # nobody has said that something was written
    OptimizerStateBackend(base, groups, store, count).base_written()
    with pytest.raises(ValueError, match="'exp_avg' of its state has"):
        check_state(groups.plans, store)
