"""Buckets of shards are kept from step to step, and any change that they follow from is noticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from sharded_pieces import shards

from selective.kernels import (
    AdamRule,
    Decay,
    Draw,
    Item,
    ItemList,
    LionRule,
    Selection,
    SGDRule,
    Strength,
    begin_sharded,
    use_backend,
)
from selective.kernels import _dispatch as dispatch
from selective.kernels.sharded import kept_buckets
from selective.kernels.spec import StepSpec

ADAM = AdamRule(0.1, 0.9, 0.99, 1e-8)
SPEC = StepSpec(ADAM, Selection("top_k", fraction=0.4), Strength("fixed", 2.0, 0.5), Draw(1, 2))


def begun(items: ItemList, spec: StepSpec = SPEC) -> None:
    begin_sharded(items, **vars(spec))


def of_one_rank(rule: Any = ADAM) -> ItemList:
    return shards(rule, 1, "plain", torch.float32)[0]


@pytest.mark.parametrize("spec", [SPEC, replace(SPEC, rule=LionRule(0.1, 0.9, 0.99)), replace(SPEC, statistics=True)])
def test_the_same_call_finds_its_buckets(spec: StepSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients and numbers of the rule are others in every step, and are not looked at one by one."""
    items = of_one_rank(spec.rule)
    begun(items, spec)
    monkeypatch.setattr(dispatch, "check_items", lambda *given: pytest.fail("the items were checked again"))
    for number in range(3):
        for item in items:
            item.grad = torch.randn_like(item.param)
        later = replace(spec, rule=replace(spec.rule, lr=0.1 / (1 + number)), draw=Draw(1, 3 + number))  # type: ignore[call-arg]
        begun(items, later)
        assert sorted(
            place for places in (kept_buckets(items, later, "auto") or {}).values() for place in places
        ) == list(range(len(items)))


def another_shard(items: ItemList) -> None:
    first = items[0]
    assert first.shard is not None
    items[0] = replace(first, shard=replace(first.shard))


def a_state_of_another_dtype(items: ItemList) -> None:
    items[1].state["exp_avg"] = items[1].state["exp_avg"].bfloat16()


def a_gradient_of_another_dtype(items: ItemList) -> None:
    items[1].grad = items[1].grad.bfloat16()


def a_missing_entry(items: ItemList) -> None:
    del items[2].state["exp_avg_sq"]


def an_average(items: ItemList) -> None:
    items[0].policy_state["average"] = torch.ones(())


def one_item_fewer(items: ItemList) -> None:
    items.pop()


CHANGES = [another_shard, a_state_of_another_dtype, a_gradient_of_another_dtype, a_missing_entry, an_average,
           one_item_fewer]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_items_is_noticed(change: Callable[[ItemList], None]) -> None:
    items = of_one_rank()
    begun(items)
    assert kept_buckets(items, SPEC, "auto") is not None
    change(items)
    assert kept_buckets(items, SPEC, "auto") is None


@pytest.mark.parametrize(
    "other",
    [
        replace(SPEC, selection=Selection("top_k", fraction=0.5)),
        replace(SPEC, selection=Selection("agreement")),
        replace(SPEC, strength=Strength("mean_preserving")),
        replace(SPEC, statistics=True),
        replace(SPEC, decay=Decay()),
        replace(SPEC, draw=Draw(1, 2, stochastic=True)),
        replace(SPEC, rule=AdamRule(0.1, 0.9, 0.99, 1e-8, amsgrad=True)),
        replace(SPEC, rule=SGDRule(0.1, 0.9)),
    ],
    ids=str,
)
def test_another_policy_is_noticed(other: StepSpec) -> None:
    items = of_one_rank()
    begun(items)
    assert kept_buckets(items, other, "auto") is None


def test_another_backend_is_noticed() -> None:
    items = of_one_rank()
    begun(items)
    with use_backend("reference"):
        begun(items)
        assert kept_buckets(items, SPEC, "auto") is None
        assert kept_buckets(items, SPEC, "reference") is not None


def test_a_gradient_of_another_shape_is_refused_in_a_later_step_too() -> None:
    items = of_one_rank()
    begun(items)
    items[0].grad = items[0].grad[:2]
    with pytest.raises(ValueError, match="every element needs its own gradient"):
        begun(items)


def test_a_momentum_that_is_about_to_be_made_is_not_kept() -> None:
    """SGD makes its buffer in the first step, and the next call has another state."""
    rule = SGDRule(0.1, 0.9)
    items = of_one_rank(rule)
    for item in items:
        item.state.clear()
    begun(items, replace(SPEC, rule=rule))
    assert kept_buckets(items, replace(SPEC, rule=rule), "auto") is None


def test_a_plain_list_keeps_nothing() -> None:
    items: list[Item] = list(of_one_rank())
    begin_sharded(items, **vars(SPEC))
    assert kept_buckets(items, SPEC, "auto") is None
