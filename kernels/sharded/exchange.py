"""The collectives of a step: what all tensors ask for goes over the wire together.

A part of a step that needs numbers of other processes is a generator: it yields int32 tensors with what it adds to a
sum, and is sent the sums. `run` takes many of them on in lockstep, one all-reduce a process group, device and round.

Note [collectives]: how often a generator asks follows from shapes, layouts, policy and options alone, which are the
same on all ranks, and never from values. So ranks meet in the same collectives in the same order, those with empty
shards too, as long as the ranks of a mesh give the same parameters a gradient. Checks of ours that may raise come
before a step's first collective, and look at what is the same everywhere (shapes, dtypes, groups, policies) or was
agreed on (`capture/agree.py`). An error that only one rank runs into, in a policy of the user's own or for want of
memory, leaves the others waiting until torch's timeout ends them.
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
class Steps:
    """A part of a step and the processes that it has to be taken with."""

    group: Any
    device: torch.device
    part: Part
    places: list[int]  # of its items in the caller's list
    asked: Tensor | None = None
    result: Sequence[Sums] | None = None

    def go_on(self, answer: Tensor | None = None) -> None:
        """Until it asks again, or is done."""
        try:
            self.asked = next(self.part) if answer is None else self.part.send(answer)
        except StopIteration as end:
            self.asked, self.result = None, end.value


def run(steps: Sequence[Steps]) -> None:
    """Take all parts, which have been started, to their ends."""
    asking = [one for one in steps if one.asked is not None]
    while asking:
        for one, answer in _summed(asking):
            one.go_on(answer)
        asking = [one for one in asking if one.asked is not None]


def _summed(asking: Sequence[Steps]) -> list[tuple[Steps, Tensor]]:
    """One all-reduce for each group and device, in the order of the first part that has it."""
    together: dict[tuple[int, torch.device], list[Steps]] = {}
    for one in asking:
        together.setdefault((id(one.group), one.device), []).append(one)
    found: list[tuple[Steps, Tensor]] = []
    for some in together.values():
        questions = [one.asked for one in some if one.asked is not None]
        buffer = torch.cat(questions)
        torch.distributed.all_reduce(buffer, group=some[0].group)
        found += zip(some, buffer.split([question.numel() for question in questions]), strict=True)
    return found


class Exchange:
    """Collects the parts of a whole step, so that tensors of all parameter groups share its collectives."""

    def __init__(self) -> None:
        self._steps: list[Steps] = []
        self._then: list[tuple[list[Steps], Callable[[Sequence[Sums] | None], None]]] = []

    def add(self, steps: list[Steps], count: int, then: Callable[[Sequence[Sums] | None], None]) -> None:
        """Start these parts; `then` gets the sums of their `count` items, in the items' order, when all is done."""
        for one in steps:
            one.go_on()
        self._steps += steps
        if any(one.asked is not None for one in steps):
            self._then.append((steps, then))
        else:  # nothing is asked of others: done, and memory is free
            then(in_order(steps, count))

    def run(self) -> None:
        """All collectives of the step."""
        run(self._steps)
        for steps, then in self._then:
            then(in_order(steps, sum(len(one.places) for one in steps)))
        self._steps, self._then = [], []


def in_order(steps: Sequence[Steps], count: int) -> Sequence[Sums] | None:
    """The sums of all parts, by the places of their items."""
    if len(steps) == 1 and steps[0].places == list(range(count)):
        return steps[0].result
    found: dict[int, Sums] = {}
    for one in steps:
        found.update(zip(one.places, one.result or (), strict=one.result is not None))
    return [found[place] for place in range(count)] if len(found) == count else None
