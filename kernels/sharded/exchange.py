"""The collectives of a step: all tensors' sums are made together.

A part of a step that needs numbers of other processes is a generator: it yields int32 tensors, its addends of a sum,
and is sent the sums. `run` takes many generators on in lockstep, with one all-reduce for each process group, device and
round.

Note [collectives]: the number of times that a generator asks follows from shapes, layouts, policy and options alone,
which are the same on all ranks, and never from values. So all ranks, also those with empty shards, meet in the same
collectives in the same order, as long as the ranks of a mesh give the same parameters a gradient. Checks of ours that
may raise come before a step's first collective, and look at what is the same on all ranks (shapes, dtypes, groups,
policies) or was agreed on (`selective/sharding/collectives.py`). An error that only one rank runs into, in a policy of
the user's own or for want of memory, leaves the others waiting until torch's timeout ends them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..spec import Sums

Part = Generator[Tensor, Tensor, Sequence[Sums] | None]  # yields a 1-d int32 tensor, is sent its sum over the group


@dataclass
class RunningPart:
    """A part of a step, and the process group whose ranks have to take it together."""

    group: Any
    device: torch.device
    part: Part
    places: list[int]  # of its items in the caller's list
    pending_addends: Tensor | None = None
    result: Sequence[Sums] | None = None

    def resume(self, answer: Tensor | None = None) -> None:
        """Run the part until it asks again or is done. `answer` is the sum that it asked for last."""
        try:
            self.pending_addends = next(self.part) if answer is None else self.part.send(answer)
        except StopIteration as end:
            self.pending_addends, self.result = None, end.value


def run(steps: Sequence[RunningPart]) -> None:
    """Run all parts, which have been started, to their ends."""
    asking = [one for one in steps if one.pending_addends is not None]
    while asking:
        for one, answer in _summed(asking):
            one.resume(answer)
        asking = [one for one in asking if one.pending_addends is not None]


def _summed(asking: Sequence[RunningPart]) -> list[tuple[RunningPart, Tensor]]:
    """Every part with its sum: one all-reduce for each group and device, in the order of the first part that has it."""
    buckets: dict[tuple[int, torch.device], list[RunningPart]] = {}
    for one in asking:
        buckets.setdefault((id(one.group), one.device), []).append(one)
    answers: list[tuple[RunningPart, Tensor]] = []
    for bucket in buckets.values():
        questions = [one.pending_addends for one in bucket if one.pending_addends is not None]
        buffer = torch.cat(questions)
        torch.distributed.all_reduce(buffer, group=bucket[0].group)
        answers += zip(bucket, buffer.split([question.numel() for question in questions]), strict=True)
    return answers


class Exchange:
    """Collects the parts of a whole step, so that tensors of all parameter groups share its collectives."""

    def __init__(self) -> None:
        self._steps: list[RunningPart] = []
        self._then: list[tuple[list[RunningPart], Callable[[Sequence[Sums] | None], None]]] = []

    def add(self, steps: list[RunningPart], count: int, then: Callable[[Sequence[Sums] | None], None]) -> None:
        """Start these parts. When all is done, `then` is called with the sums of their `count` items, in order."""
        for one in steps:
            one.resume()
        self._steps += steps
        if any(one.pending_addends is not None for one in steps):
            self._then.append((steps, then))
        else:  # nothing is asked of other ranks: done, so that memory is freed now
            then(in_order(steps, count))

    def run(self) -> None:
        """Run all collectives of the step."""
        run(self._steps)
        for steps, then in self._then:
            then(in_order(steps, sum(len(one.places) for one in steps)))
        self._steps, self._then = [], []


def in_order(steps: Sequence[RunningPart], count: int) -> Sequence[Sums] | None:
    """The sums of all parts in the order of their `count` items; None if nothing was reported."""
    if len(steps) == 1 and steps[0].places == list(range(count)):
        return steps[0].result
    by_place: dict[int, Sums] = {}
    for one in steps:
        by_place.update(zip(one.places, one.result or (), strict=one.result is not None))
    return [by_place[place] for place in range(count)] if len(by_place) == count else None
