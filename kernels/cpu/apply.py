"""Step 7 over one chunk: mask times direction onto the decayed parameter, one read-modify-write."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference.rounding import store
from ..reference.rules import decay_factor, number
from ..spec import Draw, GivenRule, Rule, Sums
from .chunks import Flat, buffer


def _single(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0] if abs(x) < 3e38 else x


@dataclass
class Totals:
    """The sums of statistics: dot products of float32 chunks (a relative error of about 1e-6), float64 across them."""

    selected: float = 0.0
    update_sq: float = 0.0
    grad_sq: float = 0.0
    update_grad: float = 0.0
    masked_sq: float = 0.0

    def sums(self, numel: int, above: float, below: float) -> Sums:
        row = torch.tensor(
            [self.selected, above, below, self.update_sq, self.grad_sq, self.update_grad, self.masked_sq],
            dtype=torch.float64,
            device="cpu",
        )
        return Sums(numel, *row.unbind())


class Applier:
    """Writes the parameter of one tensor, with two multipliers that are known."""

    def __init__(
        self,
        rule: Rule,
        flat: Flat,
        dtype: torch.dtype,
        above: float,
        below: float,
        *,
        still: bool,
        draw: Draw,
        address: int,
    ) -> None:
        self.flat, self.dtype, self.still, self.draw, self.address = flat, dtype, still, draw, address
        self.above, self.below = (above, below) if dtype == torch.float64 else (_single(above), _single(below))
        self.factor = float(number(decay_factor(rule)))
        self.offset = rule.offset if isinstance(rule, GivenRule) else 0.0
        self.start = flat.state["start"] if isinstance(rule, GivenRule) else flat.param
        self.difference = self.above - self.below
        if dtype != torch.float64:
            self.difference = _single(self.difference)
            together = _single(self.difference + self.below)
        else:
            together = self.difference + self.below
        self.two_operations = together == self.above  # else the selected would be multiplied by a neighbour of `above`

    def _mask(self, selected: Tensor) -> Tensor:
        """From 1.0 and 0.0 to the two multipliers, in place and exactly those two."""
        if self.two_operations:
            selected.mul_(self.difference)
            return selected.add_(self.below) if self.below != 0 else selected
        others = torch.neg(selected, out=buffer("masked", selected.numel(), self.dtype)).add_(1.0)
        return selected.mul_(self.above).add_(others, alpha=self.below)

    def __call__(
        self, start: int, end: int, direction: Tensor, grad: Tensor, selected: Tensor | None, totals: Totals | None
    ) -> None:
        """`selected` (1.0 and 0.0, overwritten) or None where everything is."""
        count = end - start
        if totals is not None:
            totals.selected += count if selected is None else float(selected.sum())
        mask = self.above if selected is None else self._mask(selected)
        masked = buffer("masked", count, self.dtype)
        if self.still:
            mask = torch.mul(direction, grad, out=masked).ne_(0).mul_(mask)
            mask = buffer("selected", count, self.dtype).copy_(mask)
        if totals is not None:
            torch.mul(direction, mask, out=masked)
            totals.update_sq += float(torch.dot(direction, direction))
            totals.grad_sq += float(torch.dot(grad, grad))
            totals.update_grad -= float(torch.dot(direction, grad))
            totals.masked_sq += float(torch.dot(masked, masked))
        if self.offset != 0:
            mask = mask.sub_(self.offset) if isinstance(mask, Tensor) else mask - self.offset
        if not isinstance(mask, Tensor) and mask == 1.0:
            masked = direction
        elif totals is None or self.offset != 0:
            torch.mul(direction, mask, out=masked)
        self._write(start, end, masked)

    def _write(self, start: int, end: int, masked: Tensor) -> None:
        param, origin = self.flat.param[start:end], self.start[start:end]
        if origin.dtype != self.dtype:
            origin = buffer("start", end - start, self.dtype).copy_(origin)
        if param.dtype == self.dtype:
            torch.add(masked, origin, alpha=self.factor, out=param)
        else:
            result = buffer("result", end - start, self.dtype)
            torch.add(masked, origin, alpha=self.factor, out=result)
            store(param, result, self.draw, self.address, start)
