"""Delta capture: the update is parameter before minus parameter after, for a base whose update depends on that.

The result is p_after + (1 - mask) u, which is exactly the base's own where the mask is 1. In bfloat16 and float16 the
difference would be mostly rounding error, so there the base steps a float32 copy, and its parameter-shaped state is
float32. A base that keeps the rounding residue (Kahan summation) does not need it on a float32 copy. We keep it
instead, in one buffer of the parameter's dtype, as the base would have done.

Memory: one copy of the parameters during the step, from which they are restored if something raises. For low-precision
parameters also float32 copies of parameter and gradient, together five times the bytes of the parameter. After the
base's step, the update of one part of the parameters at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from selective import foreach
from selective.base.hyperparameters import LOW_PRECISION
from selective.capture.generic import Captured, GenericJob, by_value
from selective.capture.stand_ins import StandIns
from selective.kernels import spec


class DeltaJob(GenericJob):
    """The job of a group whose base steps the parameters themselves, or float32 copies of them."""

    offset = 1.0
    makes_updates = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stand_ins = StandIns(self.context.base, self.group)
        self.left: dict[Tensor, Tensor] = {}  # low-precision parameters -> their float32 copies after the base's step
        self.started: dict[int, Tensor] = {}  # index of such a parameter -> its value before, with the residue
        if self.decay is not None:  # it starts from the value before, with which the update's sign is compared
            self.offset = 0.0

    def before_base(self) -> None:
        self.remember()
        low = [i for i, before in enumerate(self.saved) if before.dtype in LOW_PRECISION]
        if low:
            self._stand_in(low)

    def _stand_in(self, low: list[int]) -> None:
        """Let the base step float32 copies of these parameters, with float32 gradients and state."""
        raw = self.raw_grads()
        values = foreach.copies([self.saved[i] for i in low], torch.float32)
        if self.facts.residue:  # without a residue, the value before the step is in `saved`
            foreach.add_(values, self._residues(low))
            self.started = dict(zip(low, foreach.copies(values), strict=True))
        grads = foreach.in_dtype([raw[i] for i in low], torch.float32)
        for index, value, grad in zip(low, values, grads, strict=True):
            self.stand_ins.put(self.parameters[index].tensor, value, grad)
        self.stand_ins.enter()

    def _residues(self, indices: Sequence[int]) -> list[Tensor]:
        return [self.context.own_residue(self.parameters[i]) for i in indices]

    def after_base(self) -> None:
        self.left = {p: stand_in.detach() for p, stand_in in self.stand_ins.give_back().items()}
        super().after_base()

    def rule_factors(self) -> Sequence[spec.Scalar]:
        if self.decay is not None:
            return super().rule_factors()
        return [1.0] * len(self.parameters)  # the start is the parameter after the base's step, decay included

    def captured(self, indices: Sequence[int]) -> list[Captured]:
        before = self._before(indices)
        after = [self._after(i) for i in indices]
        updates = foreach.differences(before, after)
        if self.facts.decay == "decoupled" and self.decay is None:  # subtract the decay, which is no part of the update
            for factor, where in by_value([self.factors[i] for i in indices]):
                if isinstance(factor, Tensor) or factor != 1.0:
                    foreach.add_([updates[i] for i in where], [before[i] for i in where], factor - 1.0)
        tensors = [self.parameters[i].tensor for i in indices]
        keeps = [self._keeps_residue(i) for i in indices]  # then the exact result is needed to compute the residue
        targets = [a if keep else p for a, keep, p in zip(after, keeps, tensors, strict=True)]
        starts = after if self.decay is None else before
        return [Captured(*triple) for triple in zip(updates, starts, targets, strict=True)]

    def _before(self, indices: Sequence[int]) -> list[Tensor]:
        """Return the values from which the base's step began, in the precision of that step."""
        before = [self.started.get(i, self.saved[i]) for i in indices]
        low = [place for place, value in enumerate(before) if value.dtype in LOW_PRECISION]
        for place, value in zip(low, foreach.copies([before[p] for p in low], torch.float32), strict=True):
            before[place] = value
        return before

    def _after(self, index: int) -> Tensor:
        p = self.parameters[index].tensor
        return self.left.get(p, p)

    def stepped(self, indices: Sequence[int]) -> None:
        with_residue = [i for i in indices if self._keeps_residue(i)]
        if with_residue:
            self._round_and_keep_residue(with_residue)

    def _round_and_keep_residue(self, indices: list[int]) -> None:
        """Round the float32 results into the parameters, and keep the residue."""
        exact, tensors = [self._after(i) for i in indices], [self.parameters[i].tensor for i in indices]
        foreach.copy_(tensors, exact)
        foreach.add_(exact, tensors, -1.0)
        foreach.copy_(self._residues(indices), exact)

    def _keeps_residue(self, index: int) -> bool:
        return self.parameters[index].tensor in self.left and bool(self.facts.residue)

    def restore(self) -> None:
        self.stand_ins.give_back()
        super().restore()
