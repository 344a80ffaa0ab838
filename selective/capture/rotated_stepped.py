"""Scratch and delta capture of rotated parameters: the base steps them while they have other data and gradients.

In scratch capture the data are zeros. In delta capture they are the parameter's value in the rotated space, which has
the same norm, so that decay of any kind comes out right. Only plain tensors are rotated here: the base would not see
the exchanged `.data` of a DTensor. The parameter's own memory is not written before the update is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from selective import foreach
from selective.base.hyperparameters import LOW_PRECISION
from selective.base.lent_gradients import LentGradients
from selective.capture.rotated import RotatedJob
from selective.capture.stand_ins import StandIns
from selective.preconditioner import as_matrix
from selective.preconditioner.matrices import from_matrices


class SwappedJob(RotatedJob):
    """The job of rotated parameters that the base steps, while they have other data and gradients."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rotated: dict[int, Tensor] = {}  # the gradients in the rotated space
        self.data: list[Tensor] = []  # the parameters' own
        self.raw: list[Tensor] = []  # the parameters' own gradients
        self.lent = LentGradients()

    def before_base(self) -> None:
        super().before_base()
        for indices in self.rotation.buckets(self.moving):
            self.rotated.update(zip(indices, self.rotated_gradients(indices), strict=True))
        if "previous_momentum" in self.reads:
            self.previous = self._momenta_kept()
        self.data, self.raw = [p.data for p in self.tensors()], self.raw_grads()
        for i in set(range(self.count)) - set(self.moving):
            self.lent.lend(self.parameters[i].tensor, None)  # the preconditioner holds it still: the base skips it
        self.swap()

    def swap(self) -> None:
        """Give the parameters other data and gradients, and compute the factors of decay, which may depend on them."""
        raise NotImplementedError

    def give(self, index: int, grad: Tensor) -> None:
        self.lent.lend(self.parameters[index].tensor, grad)

    def _swap_back(self) -> None:
        for p, data in zip(self.tensors(), self.data, strict=False):
            p.data = data
        self.lent.give_back()
        self.data, self.raw = [], []

    def after_base(self) -> None:
        left = self.left_by_base()
        self._swap_back()
        for indices in self.rotation.buckets(self.moving):
            rotated = [self.rotated.pop(i) for i in indices]
            for i, grad in zip(indices, rotated, strict=True):
                self.grads[i] = grad  # type: ignore[index]
            self.take(indices, rotated, self.momenta_of_base(indices), [self.previous[i] for i in indices])
            updates, negated = self.updates(indices, [left.pop(i) for i in indices])
            self.mask_and_apply(indices, updates, negated=negated)
        self.close()

    def left_by_base(self) -> dict[int, Tensor]:
        """Return the data of the moving parameters after the base's step, by index."""
        return {i: self.parameters[i].tensor.data for i in self.moving}

    def updates(self, indices: list[int], left: list[Tensor]) -> tuple[list[Tensor], bool]:
        """Return the updates from the data after the base's step, and True if they have the opposite sign."""
        raise NotImplementedError

    def restore(self) -> None:
        self._swap_back()
        super().restore()


class RotatedScratchJob(SwappedJob):
    """The job in which the base steps zeros in the parameter's dtype, which become -u."""

    def swap(self) -> None:
        for i in self.moving:
            rotated, dtype = self.rotated[i], self.base_dtype(i)
            shared = dtype == rotated.dtype and self.sign > 0 and not self.facts.writes_grad
            grad = rotated if shared else rotated.to(dtype, copy=True)
            self.give(i, grad.neg_() if self.sign < 0 else grad)  # a base that maximizes negates it again
        self.factors = self._factors()
        for i in self.moving:
            p = self.parameters[i].tensor
            p.data = torch.zeros_like(p.data)

    def updates(self, indices: list[int], left: list[Tensor]) -> tuple[list[Tensor], bool]:
        return left, True


class RotatedDeltaJob(SwappedJob):
    """The job in which the base steps the parameter's value in the rotated space, in float32."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stand_ins = StandIns(self.context.base, self.group)
        self.before: dict[int, Tensor] = {}
        low = [i for i, p in enumerate(self.tensors()) if p.dtype in LOW_PRECISION]
        self.with_residue = set(low) if self.facts.residue else set()

    def swap(self) -> None:
        for indices in self.rotation.buckets(self.moving):
            values = self.rotation.project_in(indices, self._exact(indices))
            if self.is_coupled or self.sign < 0:  # raw gradients: the base itself adds decay and negates
                grads = self.rotation.gradients_in(indices, [self.raw[i] for i in indices])
            else:
                grads = foreach.copies([self.rotated[i] for i in indices])
            for i, value, grad in zip(indices, values, grads, strict=True):
                p, self.before[i] = self.parameters[i].tensor, value.clone()
                if p.dtype in LOW_PRECISION:
                    self.stand_ins.put(p, value, grad)
                else:
                    p.data = value
                    self.give(i, grad.to(self.raw[i].dtype))
        self.factors = self._factors()
        self.stand_ins.enter()

    def asked_for_decay(self) -> list[Tensor]:
        return [self.stand_ins.of.get(p, p) for p in self.tensors()]

    def left_by_base(self) -> dict[int, Tensor]:
        stand_ins = self.stand_ins.give_back()
        tensors = [self.parameters[i].tensor for i in self.moving]
        return {
            i: stand_ins[p].detach() if p in stand_ins else p.data for i, p in zip(self.moving, tensors, strict=True)
        }

    def restore(self) -> None:
        self.stand_ins.give_back()
        super().restore()

    def updates(self, indices: list[int], left: list[Tensor]) -> tuple[list[Tensor], bool]:
        before = [self.before.pop(i) for i in indices]
        updates = foreach.differences(before, left)
        if self.facts.decay == "decoupled" and self.decay is None:  # subtract the decay, which is no part of the update
            for u, value, i in zip(updates, before, indices, strict=True):
                u.add_(value * (self.factors[i] - 1.0))
        return updates, False

    # --- base optimizers that keep a rounding residue ---

    def _exact(self, indices: list[int]) -> list[Tensor]:
        """Return the parameters in float32, with the residue that we keep of them."""
        values = [as_matrix(self.data[i], self.rotation.bases[i].shape) for i in indices]
        values = [from_matrices(v, self.data[i].shape) for i, v in zip(indices, values, strict=True)]
        return [v + self._residue(i) if i in self.with_residue else v for i, v in zip(indices, values, strict=True)]

    def _residue(self, index: int) -> Tensor:
        return self.context.own_residue(self.parameters[index])

    def _starts(self, indices: Sequence[int]) -> list[Tensor]:
        starts = zip(indices, super()._starts(indices), strict=True)
        return [p.float() + self._residue(i) if i in self.with_residue else p for i, p in starts]

    def _keep_residue(self, indices: list[int], exact: Sequence[Tensor]) -> None:
        for i, value in zip(indices, exact, strict=True):
            p = self.parameters[i].tensor
            if value is not p:
                p.copy_(value)
                self._residue(i).copy_(value - p)
