"""Scratch capture: the base steps on zeros that stand in for the parameter, and what it leaves there is exactly -u.

Right for every base whose update does not look at the parameter. Costs the parameters' size in memory during the step
(and as much as the gradients where decay is coupled).

Note [whose memory]: the parameter tensor is the base's to step in any case, because bases know it by identity. Its
memory is exchanged for zeros, where that can be done: `p.data` points there until the base has stepped, nothing is
copied, and the update is still there when the parameter is written. Otherwise the values are copied, and the memory is
zeroed in place: for a DTensor, which an exchange does not reach; for a base that holds on to memory (`keeps_memory`);
for a parameter whose memory has gaps; and for a policy with code of its own, which may raise when half of the
parameters are written, so that a copy is needed anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from selective import foreach
from selective.base.lent_gradients import LentGradients
from selective.capture.generic import Captured, GenericJob


class ScratchJob(GenericJob):
    """The base steps on zeros."""

    negated = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lent = LentGradients()  # with decay in them, where it is coupled
        self.exchanged: dict[int, Tensor] = {}  # index of a parameter -> its own memory, while it has other
        self.copied: list[int] = []  # indices of the parameters whose values were copied
        self.left: dict[int, Tensor] = {}  # index of a parameter -> what the base has left on zeros

    def keep_parameters(self) -> list[Tensor]:
        """The values, where they lie: Note [whose memory]."""
        tensors = self.tensors()
        can = not (self.facts.keeps_memory or self.own_code)
        own = {i: p.data for i, p in enumerate(tensors) if can and foreach.is_plain_and_dense(p)}
        self.copied = [i for i in range(len(tensors)) if i not in own]
        kept = {**own, **dict(zip(self.copied, foreach.copies([tensors[i] for i in self.copied]), strict=True))}
        self.exchanged = own
        return [kept[i] for i in range(len(tensors))]

    def prepare(self) -> None:
        self.remember()
        tensors = self.tensors()
        if self.is_coupled:  # decay vanishes on zeros: give the base the gradient that it would have made
            for p, stand_in in zip(tensors, self._decayed_gradients(), strict=True):
                self.lent.lend(p, stand_in)
        foreach.zero_([p for i, p in enumerate(tensors) if i not in self.exchanged])
        for index, zeros in zip(self.exchanged, foreach.zeros_like(list(self.exchanged.values())), strict=True):
            tensors[index].data = zeros

    def _decayed_gradients(self) -> list[Tensor]:
        """The gradients with decay in them, as the base would have made them; the policy's own where they are those."""
        raw = self.raw_grads()
        found: dict[int, Tensor] = {}
        if self.sign > 0 and not self.facts.writes_grad:
            found = {i: g for i, g in enumerate(self.grads) if g is not None and g.dtype == raw[i].dtype}
        others = [i for i in range(len(raw)) if i not in found]
        made = foreach.sums([raw[i] for i in others], [self.saved[i] for i in others], self.coupled)
        found.update(zip(others, made, strict=True))
        return [found[i] for i in range(len(raw))]

    def captured(self, indices: Sequence[int]) -> list[Captured]:
        found = []
        for i in indices:
            p = self.parameters[i].tensor
            found.append(Captured(self.left[i], p, p) if i in self.left else Captured(p, self.saved[i], p))
        return found

    def finish(self) -> None:
        self.lent.give_back()
        self.left = self._give_memory_back()
        super().finish()
        self.left = {}

    def restore(self) -> None:
        self.lent.give_back()
        self._give_memory_back()
        if self.saved:
            for index in self.copied:
                self.parameters[index].tensor.copy_(self.saved[index])

    def _give_memory_back(self) -> dict[int, Tensor]:
        """Parameters are where they were; returns what was in their place."""
        found = {}
        for index, own in self.exchanged.items():
            p = self.parameters[index].tensor
            found[index], p.data = p.data, own
        self.exchanged = {}
        return found
