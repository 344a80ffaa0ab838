"""Step 7 over one chunk: mask times -u onto the decayed parameter, one read-modify-write."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference.rounding import store
from ..reference.rules import decay_factor, number, rate_of
from ..spec import GivenRule, StepSpec, Sums
from .chunks import Flat, buffer, rounded, spans
from .decay import decayed_where, decaying
from .scaled import add_scaled_


@dataclass
class Totals:
    """The sums of statistics: float32 dot products within a chunk, float64 across.

    The relative error is about 1e-6; where all numbers are of one size, such as in Adam's first step, up to 5e-4.
    """

    selected: float = 0.0
    update_sq: float = 0.0
    grad_sq: float = 0.0
    update_grad: float = 0.0
    masked_sq: float = 0.0

    def add(self, minus_update: Tensor, grad: Tensor, update_sq: float | None = None) -> None:
        """Add the sums of one chunk that do not depend on the mask. `update_sq` is the sum of u^2, if it is known."""
        self.update_sq += float(torch.dot(minus_update, minus_update)) if update_sq is None else update_sq
        self.grad_sq += float(torch.dot(grad, grad))
        self.update_grad -= float(torch.dot(minus_update, grad))

    def sums(self, numel: int, selected: float, rest: float) -> Sums:
        """The report of a tensor of `numel` elements with these two multipliers."""
        row = torch.tensor(
            [self.selected, selected, rest, self.update_sq, self.grad_sq, self.update_grad, self.masked_sq],
            dtype=torch.float64,
            device="cpu",
        )
        return Sums(numel, *row.unbind())


class Multipliers:
    """Turns 1.0 and 0.0 into the two multipliers, exactly those two as the dtype has them."""

    def __init__(self, selected: float, rest: float, dtype: torch.dtype) -> None:
        single = dtype != torch.float64
        self.selected, self.rest, self.dtype = selected, rest, dtype
        if single:
            self.selected, self.rest = rounded(selected), rounded(rest)
        self.difference = self.selected - self.rest
        if single:
            self.difference = rounded(self.difference)
        together = rounded(self.difference + self.rest) if single else self.difference + self.rest
        self.one_operation = together == self.selected  # else the selected would get a neighbour of their multiplier

    @functools.cached_property
    def rest_alone(self) -> Tensor:
        return torch.tensor(self.rest, dtype=self.dtype, device="cpu")

    def __call__(self, chosen: Tensor) -> Tensor:
        """The mask of a chunk, in the memory of `chosen`, which is 1.0 where selected, else 0.0."""
        if self.one_operation:
            if self.rest == 0:
                return chosen if self.difference == 1 else chosen.mul_(self.difference)
            return torch.add(self.rest_alone, chosen, alpha=self.difference, out=chosen)
        others = torch.neg(chosen, out=buffer("masked", chosen.numel(), self.dtype)).add_(1.0)
        return chosen.mul_(self.selected).add_(others, alpha=self.rest)


class Applier:
    """Writes the parameter of one tensor, whose two multipliers are known."""

    def __init__(
        self, spec: StepSpec, flat: Flat, dtype: torch.dtype, pair: tuple[float, float], *, still: bool, address: int
    ) -> None:
        rule = spec.rule
        self.flat, self.dtype, self.still, self.draw, self.address = flat, dtype, still, spec.draw, address
        self.pair = pair
        self.selected = pair[0] if dtype == torch.float64 else rounded(pair[0])
        self.factor = float(number(decay_factor(rule)))
        self.decay, self.climbs = spec.decay, spec.decay is not None and float(rate_of(rule)) < 0
        self.offset = rule.offset if isinstance(rule, GivenRule) else 0.0
        self.start = flat.state["start"] if isinstance(rule, GivenRule) else flat.param

    def __call__(
        self, start: int, end: int, minus_update: Tensor, grad: Tensor, chosen: Tensor | None, totals: Totals | None
    ) -> None:
        """Step the elements of `[start, end)` and add them to `totals`.

        `chosen` is 1.0 where selected, else 0.0, and is overwritten; None if everything is selected.
        """
        count = end - start
        if totals is not None:
            totals.selected += count if chosen is None else float(chosen.sum())
        mask = self.selected if chosen is None else self.multipliers(chosen)
        masked = buffer("masked", count, self.dtype)
        if self.still:
            mask = torch.mul(minus_update, grad, out=masked).ne_(0).mul_(mask)
            mask = buffer("selected", count, self.dtype).copy_(mask)
        if totals is not None:
            torch.mul(minus_update, mask, out=masked)
            totals.add(minus_update, grad)
            totals.masked_sq += float(torch.dot(masked, masked))
        if self.offset != 0:
            mask = mask.sub_(self.offset) if isinstance(mask, Tensor) else mask - self.offset
        if not isinstance(mask, Tensor) and mask == 1.0:
            masked = minus_update
        elif totals is None or self.offset != 0:
            # In the mask's own memory, if it has one: one buffer fewer has to stay in the cache.
            masked = torch.mul(minus_update, mask, out=mask if isinstance(mask, Tensor) else masked)
        self._write(start, end, masked, minus_update, grad)

    @functools.cached_property
    def multipliers(self) -> Multipliers:
        return Multipliers(*self.pair, self.dtype)

    def write_masked(self, masked: Tensor) -> None:
        """Step the whole tensor, given -u times the mask, up to the factor of the selected.

        Only where decay reaches every coordinate, and without an offset.
        """
        param = self.flat.param
        if self.decay is None and self.start is param and param.dtype == self.dtype:
            add_scaled_(param, self.factor, masked, self.selected)
            return
        for start, end in spans(masked.numel()):
            part = masked[start:end]
            if self.selected != 1:
                part = torch.mul(part, self.selected, out=buffer("masked", end - start, self.dtype))
            self._write(start, end, part, part, part)

    def _write(self, start: int, end: int, masked: Tensor, minus_update: Tensor, grad: Tensor) -> None:
        param, origin = self.flat.param[start:end], self.start[start:end]
        if origin.dtype != self.dtype:
            origin = buffer("start", end - start, self.dtype).copy_(origin)
        out = param if param.dtype == self.dtype else buffer("result", end - start, self.dtype)
        if self.decay is None:
            torch.add(masked, origin, alpha=self.factor, out=out)
        else:
            decays = decaying(self.decay, minus_update, masked, grad, origin, self.climbs)
            decayed_where(decays, masked, origin, self.factor, out)
        if out is not param:
            store(param, out, self.draw, self.address, start)
