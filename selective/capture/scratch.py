"""Scratch capture: the base steps on zeros that stand in for the parameter, and what it leaves there is exactly -u.

Right for every base whose update does not look at the parameter. Costs one copy of the parameters during the step (and
one of the gradients where decay is coupled). The storage is zeroed in place rather than swapped, because a base may
hold the tensor by identity and because swapping `.data` has no effect on a DTensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from selective.capture import lists
from selective.capture.generic import Captured, GenericJob


class ScratchJob(GenericJob):
    """The base steps on zeros."""

    negated = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.their_grads: list[tuple[Tensor, Tensor | None, Tensor]] = []  # parameter, its gradient, our stand-in

    def prepare(self) -> None:
        self.remember()
        tensors = self.tensors()
        if self.is_coupled:  # decay vanishes on zeros: give the base the gradient that it would have made
            for p, stand_in in zip(tensors, self._decayed_gradients(), strict=True):
                self.their_grads.append((p, p.grad, stand_in))
                p.grad = stand_in
        lists.zero_(tensors)

    def _decayed_gradients(self) -> list[Tensor]:
        """The gradients with decay in them, as the base would have made them; the policy's own where they are those."""
        raw = self.raw_grads()
        found: dict[int, Tensor] = {}
        if self.sign > 0 and not self.facts.writes_grad:
            found = {i: g for i, g in enumerate(self.grads) if g is not None and g.dtype == raw[i].dtype}
        others = [i for i in range(len(raw)) if i not in found]
        made = lists.sums([raw[i] for i in others], [self.saved[i] for i in others], self.coupled)
        found.update(zip(others, made, strict=True))
        return [found[i] for i in range(len(raw))]

    def captured(self, indices: Sequence[int]) -> list[Captured]:
        tensors = [self.parameters[i].tensor for i in indices]
        return [Captured(p, self.saved[i], p) for p, i in zip(tensors, indices, strict=True)]

    def finish(self) -> None:
        self._give_gradients_back()
        super().finish()

    def restore(self) -> None:
        self._give_gradients_back()
        super().restore()

    def _give_gradients_back(self) -> None:
        for p, grad, stand_in in self.their_grads:
            if p.grad is stand_in:  # unless the base cleared it
                p.grad = grad
        self.their_grads = []
