"""`selective_steps`: the steps of several lists of items, which share launches where Triton kernels take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from ._dispatch import Backend, _chosen, _gpu, _paths, _step_by, _with_triton_function, why_no_triton
from .spec import StepCall, Sums


@torch.no_grad()
def selective_steps(calls: Sequence[StepCall], *, backend: Backend = "auto") -> list[Sequence[Sums] | None]:
    """`selective_step` of several calls, each with a rule and a mask of its own. Returns the sums of each.

    Triton kernels step the tensors of all calls that differ in numbers only by the same launches. Other paths step one
    call after the other. Results are those of separate calls, bit for bit: no tensor's step reads another's.

    Takes and refuses the same as `selective_step`, except shards (`begin_sharded`). All calls are checked before
    anything moves.
    """
    calls = [StepCall(call.items, _with_triton_function(call.spec)) for call in calls]
    places = [place for place, call in enumerate(calls) if len(call.items) > 0]
    results: list[Sequence[Sums] | None] = [[] if call.spec.statistics else None for call in calls]
    steps: list[tuple[list[int], Callable[[], Sequence[Sequence[Sums] | None]]]] = []
    unplanned = []
    for part in _parts([calls[place] for place in places], backend):
        chosen = [places[i] for i in part]
        plan = _gpu().plan_of([calls[place] for place in chosen])
        if plan is None:
            unplanned += chosen
        else:  # all that follows below was settled in an earlier step
            steps.append((chosen, partial(plan.run, [calls[place] for place in chosen])))
    planned = {place for chosen, _ in steps for place in chosen}
    by_kernels = []
    for place in places:
        if place in planned:
            continue
        call = calls[place]
        paths = _paths(call.items, call.spec, backend)
        if list(paths) == ["gpu"]:
            by_kernels.append(place)
        else:
            steps.append(([place], partial(_alone, call, paths)))
    if by_kernels:
        steps.append((by_kernels, partial(_gpu().selective_steps, [calls[place] for place in by_kernels])))
    for chosen, run in steps:
        for place, sums in zip(chosen, run(), strict=True):
            results[place] = sums
    return results


def _parts(calls: Sequence[StepCall], backend: Backend) -> list[list[int]]:
    """The indices of calls that Triton kernels may step, by parts that may have a plan together."""
    asked = _chosen(backend)
    if asked not in ("gpu", "auto") or (asked == "auto" and not any(call.items[0].param.is_cuda for call in calls)):
        return []
    if why_no_triton() is not None:
        return []
    return _gpu().parts(calls)


def _alone(call: StepCall, paths: dict[Backend, list[int]]) -> list[Sequence[Sums] | None]:
    return [_step_by(paths, call.items, call.spec)]
