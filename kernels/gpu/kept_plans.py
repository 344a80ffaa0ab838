"""The plans that are kept from step to step, in the `cache` of each `ItemList` that they step.

    plan                          the plan of the last step
    upload_hyperparameters        its function, for the hyper-parameters of this list
    describe_launches             its function
    plans                         the last two plans, newest first, each with the number of the list's call

A list knows two plans, so that a parameter group without gradients drops out and comes back, and nothing is made anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ..spec import Item, ItemList, StepCall
from .batches import Plan

MOST = 2  # plans of a list


def parts(calls: Sequence[StepCall]) -> list[list[int]]:
    """The indices of calls that are stepped together: those with a plan, and apart from them those without one.

    So all others keep their plan if a group's list is made anew in every step. While a CUDA graph is recorded, those
    with a plan are stepped as in the step before, because a graph can't have the operations that make another one.
    """
    plans = [call.items.cache.get("plan") if isinstance(call.items, ItemList) else None for call in calls]
    if not [plan for plan in plans if plan is not plans[0]]:
        return [list(range(len(calls)))]
    recording = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    found: dict[object, list[int]] = {}
    for index, plan in enumerate(plans):
        found.setdefault(id(plan) if recording else plan is None, []).append(index)
    return list(found.values())


def plan_of(calls: Sequence[StepCall]) -> Plan | None:
    """The kept plan that steps exactly these calls, in this order, if it fits them still; else None."""
    caches = [call.items.cache if isinstance(call.items, ItemList) else {} for call in calls]
    for plan, _ in caches[0].get("plans", ()):
        # plans are compared by identity
        without = [cache for place, cache in enumerate(caches) if (plan, place) not in cache.get("plans", ())]
        if without or len(plan.counts) != len(calls):
            continue
        if plan.fits(calls):
            _put_first(plan, caches)
            return plan
        for cache in caches:
            _forget(cache, plan)
        return None
    return None


def keep(plan: Plan, lists: Sequence[Sequence[Item]]) -> None:
    """Keep a new plan for the next step of these lists, if all of them are kept themselves."""
    caches = [items.cache for items in lists if isinstance(items, ItemList)]
    if len(caches) == len(lists):
        _put_first(plan, caches)


def _put_first(plan: Plan, caches: Sequence[dict[Any, Any]]) -> None:
    for place, cache in enumerate(caches):
        if cache.get("plan") is not plan:
            before = [entry for entry in cache.get("plans", ()) if entry[0] is not plan]
            cache["plans"] = [(plan, place), *before][:MOST]
            cache["plan"], cache["upload_hyperparameters"] = plan, partial(plan.upload_hyperparameters, place)
            cache["describe_launches"] = plan.describe_launches


def _forget(cache: dict[Any, Any], plan: Plan) -> None:
    cache["plans"] = [entry for entry in cache["plans"] if entry[0] is not plan]
    if cache["plan"] is plan:
        del cache["plan"], cache["upload_hyperparameters"], cache["describe_launches"]
