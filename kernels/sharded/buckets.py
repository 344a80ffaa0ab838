"""Buckets: the shards of a call that are stepped together, found once and kept as long as nothing about them changes.

To look at each shard of a model takes longer on the host than the launches of its step. So what the answer follows from
is compared as a whole: the policy, the shards, and the layouts of all tensors (`layouts.py`). If all of it is as it was
in the step before, the call needs no check either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from ..layouts import layouts_of
from ..spec import GivenRule, Item, ItemList, Rule, StepSpec
from .gpu_path import has_gpu_kernel, kind_of

Buckets = dict[tuple[object, ...], list[int]]  # the places of the items that go together, by what they have in common
KEPT = ("buckets",)  # the entry of an `ItemList.cache`


def is_local(spec: StepSpec) -> bool:
    """True if the kernels for whole tensors do the same on shards: nothing but single coordinates is looked at.

    For masks they draw random numbers from a place in the whole tensor on; for rounding they do not have that place.
    """
    if spec.selection.kind == "top_k" or spec.keeps_previous or spec.strength.kind != "fixed":
        return False
    return not spec.draw.stochastic


def buckets_of(items: Sequence[Item], spec: StepSpec, kernels: Callable[[Item], Any]) -> Buckets:
    """The places of the items that go together, by what they have in common.

    All ranks have to build the same buckets, so these do not depend on how much of a tensor is here. A key is: process
    group, device, is a float64 top-K, is stepped like a whole tensor, the Triton kernels, and what one kernel can take.
    """
    selection = spec.selection
    buckets: Buckets = {}
    for place, item in enumerate(items):
        assert item.shard is not None
        double = item.param.dtype == torch.float64 and selection.kind == "top_k"
        here = is_local(spec) and not (selection.kind == "bernoulli" and item.shard.first(selection.unit) is None)
        able = spec.statistics and item.shard.numel < 1 << 31 if here else has_gpu_kernel(item, spec)
        step_kernels = kernels(item) if able else None
        same = () if here or step_kernels is None else kind_of(item, spec)
        key = (id(item.shard.group), item.param.device, double, here, step_kernels, *same)
        buckets.setdefault(key, []).append(place)
    return buckets


class KeptBuckets:
    """The buckets of one call, and all that they and the checks before them follow from."""

    def __init__(self, items: Sequence[Item], spec: StepSpec, backend: str, columns: list[list[Tensor]]) -> None:
        self.found: Buckets = {}
        self._how, self._shards = _how(spec, backend), [item.shard for item in items]
        self._layouts = [layouts_of(column) for column in columns]

    def hold(self, items: Sequence[Item], spec: StepSpec, backend: str) -> bool:
        """True if the same call comes again. Numbers of the rule, gradients and memory may be others."""
        if len(items) != len(self._shards) or not all(map(is_, [item.shard for item in items], self._shards)):
            return False
        columns = _columns(items, spec.rule)
        if columns is None or len(columns) != len(self._layouts) or _how(spec, backend) != self._how:
            return False
        pairs = zip(self._layouts, columns, strict=True)
        return all(known is not None and known.are_of(column) for known, column in pairs)


def kept_buckets(items: Sequence[Item], spec: StepSpec, backend: str) -> Buckets | None:
    """The buckets of a call that was made in an earlier step with this list of items; None if it is another one."""
    kept: KeptBuckets | None = items.cache.get(KEPT) if isinstance(items, ItemList) else None
    return kept.found if kept is not None and kept.hold(items, spec, backend) else None


def keep_buckets(items: Sequence[Item], spec: StepSpec, backend: str, found: Buckets) -> None:
    """Keep the buckets for the next steps of an `ItemList`, unless a state is about to be made."""
    if not isinstance(items, ItemList):
        return
    columns = _columns(items, spec.rule)
    items.cache.pop(KEPT, None)
    if columns is not None:
        kept = items.cache[KEPT] = KeptBuckets(items, spec, backend, columns)
        kept.found = found


def _how(spec: StepSpec, backend: str) -> tuple[object, ...]:
    rule = spec.rule
    of_rule = type(rule), rule.state_names, rule.counts_steps, rule.first_moment
    return (backend, *of_rule, spec.selection, spec.strength, spec.draw.stochastic, spec.statistics, spec.decay)


def _columns(items: Sequence[Item], rule: Rule) -> list[list[Tensor]] | None:
    """The tensors of all items that a check looks at; None if some lack an entry, or an update is given."""
    if isinstance(rule, GivenRule):
        return None
    names = [*rule.state_names, *(["step"] if rule.counts_steps else [])]
    averages = [item.policy_state["average"] for item in items if "average" in item.policy_state]
    if len(averages) not in (0, len(items)):
        return None
    try:
        states = [[item.state[name] for item in items] for name in names]
    except KeyError:
        return None
    return [[item.param for item in items], [item.grad for item in items], *states, *([averages] if averages else [])]
