"""Scratch capture: the base steps zeros that stand in for the parameter, and they become exactly -u.

It is right for every base whose update does not depend on the parameter. During the step it needs memory of the size of
the parameters, and with coupled decay also of the size of the gradients.

Note [whose memory]: the base always steps the parameter tensor itself, because optimizers know parameters by identity.
Where possible, its memory is exchanged: `p.data` is zeros until the base has stepped. Nothing is copied, and the update
is still in the zeros when the parameter is written. Elsewhere the values are copied, and the memory is zeroed in place:
for a DTensor, whose local part an exchange does not reach; for a base that remembers memory (`keeps_memory`); for a
parameter whose memory has gaps; and for a policy's own code, which may raise when half of the parameters are written,
so that a copy is needed anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from selective import foreach
from selective.base.lent_gradients import LentGradients
from selective.capture.generic import Captured, GenericJob


class ScratchJob(GenericJob):
    """The job of a group whose base steps zeros."""

    negated = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lent = LentGradients()  # gradients with coupled decay in them
        self.exchanged: dict[int, Tensor] = {}  # index of a parameter -> its own memory, while it has zeros
        self.copied: list[int] = []  # indices of the parameters whose values were copied
        self.left: dict[int, Tensor] = {}  # index of a parameter -> its zeros, which the base has stepped

    def keep_parameters(self) -> list[Tensor]:
        """Return the values: the parameters' own memory, or copies of it. Note [whose memory]."""
        tensors = self.tensors()
        can_exchange = not (self.facts.keeps_memory or self.own_code)
        memory = {i: p.data for i, p in enumerate(tensors) if can_exchange and foreach.is_plain_and_dense(p)}
        self.copied = [i for i in range(len(tensors)) if i not in memory]
        copies = zip(self.copied, foreach.copies([tensors[i] for i in self.copied]), strict=True)
        values = {**memory, **dict(copies)}
        self.exchanged = memory
        return [values[i] for i in range(len(tensors))]

    def before_base(self) -> None:
        self.remember()
        tensors = self.tensors()
        if self.is_coupled:  # the base would decay the zeros, so the decay is added to its gradients
            for p, stand_in in zip(tensors, self._decayed_gradients(), strict=True):
                self.lent.lend(p, stand_in)
        foreach.zero_([p for i, p in enumerate(tensors) if i not in self.exchanged])
        for index, zeros in zip(self.exchanged, foreach.zeros_like(list(self.exchanged.values())), strict=True):
            tensors[index].data = zeros

    def _decayed_gradients(self) -> list[Tensor]:
        """Return the gradients with decay in them, as the base would have computed them.

        If the policy's gradients are the same, they are returned and not computed again.
        """
        raw = self.raw_grads()
        decayed: dict[int, Tensor] = {}
        if self.sign > 0 and not self.facts.writes_grad:
            decayed = {i: g for i, g in enumerate(self.grads) if g is not None and g.dtype == raw[i].dtype}
        others = [i for i in range(len(raw)) if i not in decayed]
        sums = foreach.sums([raw[i] for i in others], [self.saved[i] for i in others], self.coupled)
        decayed.update(zip(others, sums, strict=True))
        return [decayed[i] for i in range(len(raw))]

    def captured(self, indices: Sequence[int]) -> list[Captured]:
        captured = []
        for i in indices:
            p = self.parameters[i].tensor
            captured.append(Captured(self.left[i], p, p) if i in self.left else Captured(p, self.saved[i], p))
        return captured

    def after_base(self) -> None:
        self.lent.give_back()
        self.left = self._give_memory_back()
        super().after_base()
        self.left = {}

    def restore(self) -> None:
        self.lent.give_back()
        self._give_memory_back()
        if self.saved:
            for index in self.copied:
                self.parameters[index].tensor.copy_(self.saved[index])

    def _give_memory_back(self) -> dict[int, Tensor]:
        """Give the parameters their own memory back, and return the zeros that the base has stepped, by index."""
        stepped = {}
        for index, memory in self.exchanged.items():
            p = self.parameters[index].tensor
            stepped[index], p.data = p.data, memory
        self.exchanged = {}
        return stepped
