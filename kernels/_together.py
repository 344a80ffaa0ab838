"""`selective_steps`: the steps of several lists of items, which share launches where Triton kernels take them.

`check_steps` is its first half, for a caller who moves other things before the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from . import checked
from ._dispatch import Backend, _chosen, _gpu, _paths, _step_by, _with_triton_function, why_no_triton
from .spec import StepCall, Sums

# The calls at these places, and the function that steps them and returns their sums.
Step = tuple[list[int], Callable[[], Sequence[Sequence[Sums] | None]]]


class CheckedCalls(list[StepCall]):
    """Calls that `check_steps` has checked, with the steps that `selective_steps` takes then."""

    def __init__(self, calls: Sequence[StepCall], steps: Sequence[Step]) -> None:
        super().__init__(calls)
        self._steps = steps

    def run(self) -> list[Sequence[Sums] | None]:
        """Take the steps, and return the sums of each call."""
        results: list[Sequence[Sums] | None] = [None] * len(self)
        for places, run in self._steps:
            for place, sums in zip(places, run(), strict=True):
                results[place] = sums
        return results


def check_steps(calls: Sequence[StepCall], *, backend: Backend = "auto") -> CheckedCalls:
    """Refuse what `selective_steps` would refuse. Returns the calls as it takes them without a second check.

    Nothing moves. Between this and the step, nobody may change the layouts of the tensors or replace their state.

    Raises ValueError for a call without items too: leave it out.
    """
    if 0 in [len(call.items) for call in calls]:
        raise ValueError("check_steps: a call has no items; leave it out")
    if "function" in [call.spec.selection.kind for call in calls]:
        calls = [StepCall(call.items, _with_triton_function(call.spec), graphs=call.graphs) for call in calls]
    parts = _parts(calls, backend)
    if len(parts) == 1 and len(parts[0]) == len(calls):  # as in most steps
        plan = _gpu().plan_of(calls)
        if plan is not None:  # all that follows below was settled in an earlier step
            return CheckedCalls(calls, [(parts[0], partial(plan.run, calls))])
    return CheckedCalls(calls, _steps_by_parts(calls, parts, backend))


def selective_steps(calls: Sequence[StepCall], *, backend: Backend = "auto") -> list[Sequence[Sums] | None]:
    """`selective_step` of several calls, each with a rule and a mask of its own. Returns the sums of each.

    Triton kernels step the tensors of all calls that differ in numbers only by the same launches. Other paths step one
    call after the other. Results are those of separate calls, bit for bit: no tensor's step reads another's.

    Takes and refuses the same as `selective_step`, except shards (`begin_sharded`). All calls are checked before
    anything moves, unless they are `CheckedCalls`.
    """
    if torch.is_grad_enabled():
        with torch.no_grad():
            return selective_steps(calls, backend=backend)
    if not isinstance(calls, CheckedCalls):
        if 0 in [len(call.items) for call in calls]:
            return _without_the_empty(calls, backend)
        calls = check_steps(calls, backend=backend)
    return checked.compared(calls, calls.run) if checked.is_on() else calls.run()


def _without_the_empty(calls: Sequence[StepCall], backend: Backend) -> list[Sequence[Sums] | None]:
    """Step the calls that have items."""
    results: list[Sequence[Sums] | None] = [[] if call.spec.statistics else None for call in calls]
    places = [place for place, call in enumerate(calls) if call.items]
    for place, sums in zip(places, selective_steps([calls[i] for i in places], backend=backend), strict=True):
        results[place] = sums
    return results


def _steps_by_parts(calls: Sequence[StepCall], parts: list[list[int]], backend: Backend) -> list[Step]:
    """Check all calls. Each part is stepped by the plan that it has, or by a new one, others without kernels."""
    steps: list[Step] = []
    for part in parts or [[place] for place in range(len(calls))]:
        chosen = [calls[place] for place in part]
        plan = _gpu().plan_of(chosen) if parts else None
        if plan is not None:
            steps.append((part, partial(plan.run, chosen)))
            continue
        paths = [_paths(call.items, call.spec, backend) for call in chosen]
        together = [place for place, path in zip(part, paths, strict=True) if list(path) == ["gpu"]]
        if together:
            steps.append((together, partial(_gpu().selective_steps, [calls[place] for place in together])))
        alone = [(place, path) for place, path in zip(part, paths, strict=True) if place not in together]
        steps += [([place], partial(_alone, calls[place], path)) for place, path in alone]
    return steps


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
