"""A matched random control of one tensor: the sums of the policy's selection, and what is done with as many others.

`draw.py` chooses those. That reads no update, unless coordinates stand still. What comes after it reads the update
twice: for the norm, and for the parameter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..spec import Control, Strength
from .apply import Multipliers
from .chunks import Squares, backwards, buffer, chunk, count_ones, sum_of_squares
from .draw import Target

WIDE = 2  # chunks that a control's passes take together: their calls take more time than a cache that is too small


@functools.cache
def _minus_one() -> Tensor:
    return torch.tensor(-1, dtype=torch.int8, device="cpu")


def _add_gained_(minus_update: Tensor, chosen: Tensor, gain: float) -> Tensor:
    """-u (1 + gain chosen), in place."""
    return minus_update.addcmul_(minus_update, chosen, value=gain)


Gradient = Callable[[int, int], Tensor]  # of a chunk, from one element to another


def with_needed_norm(control: Control, strength: Strength) -> Control:
    """The control; without a norm to keep if every choice of coordinates has the policy's.

    So it is where both multipliers have one size, as those of `Grams`.
    """
    same = strength.kind == "fixed" and abs(strength.selected) == abs(strength.rest) and control.cap >= 1
    return replace(control, norm=False) if same else control


def gain_of(selected: float, rest: float) -> float | None:
    """The c of mask = rest (1 + c chosen), by which one operation masks a chunk; None where that would round too much.

    Within the bounds the mask is right to 1.5 eps, and (mask u / rest)^2 is at most a thousand times u^2: it overflows
    only where an update is larger than 5e17.
    """
    return (selected - rest) / rest if abs(rest) <= abs(selected) <= 32 * abs(rest) and rest != 0 else None


class Matched:
    """One tensor's control: `add` each chunk with what the policy selects there; after the draw `scale` or `mask_`."""

    def __init__(
        self,
        control: Control,
        strength: Strength,
        numel: int,
        dtype: torch.dtype,
        in_place: bool,
    ) -> None:
        """`in_place`: what comes after the draw is `mask_`, and not `scale`."""
        self.control, self.rest, self.numel, self.dtype = control, strength.rest, numel, dtype
        self.still = strength.still
        # Where both multipliers are known, (mask u)^2 is added up, which takes fewer operations than its two parts.
        self.gain = gain_of(strength.selected, strength.rest) if in_place and strength.kind == "fixed" else None
        # True if the policy's selection is only counted, and what stands still, too.
        self.counts_only = not control.norm and strength.kind == "fixed" and strength.still
        self.count = 0  # the number that the policy selects
        self.moving = 0 if self.still else numel  # the number that do not stand still
        self.theirs_sq = self.all_sq = 0.0  # of u, where the policy selects and everywhere
        self.masked_sq = Squares()  # of mask u / rest, in place of the two, where `gain` is known

    def add(
        self, minus_update: Tensor, grad: Tensor, selected: Tensor | None, count: int, product: Tensor | None = None
    ) -> float | None:
        """Add one chunk of the policy's selection: 1.0 and 0.0, of which `count` are 1.0; None if all is selected.

        `product` is -u g, if the selection has it. Overwrites `selected` and `product`. Returns the sum of u^2, if that
        was needed.
        """
        n, whole = minus_update.numel(), True
        self.count += count
        if self.still:
            moves = self._moves(minus_update, grad) if product is None else product.ne_(0)
            moving = count_ones(moves)
            self.moving += moving
            whole = moving == n
            if not whole:  # those that stand still have no part in a norm
                minus_update = moves.mul_(minus_update)
        if not self.control.norm:
            return None
        if self.gain is not None:
            self._add_masked(minus_update, selected, self.gain)
            return None
        every = sum_of_squares(minus_update) if selected is None or self.rest != 0 else None
        self.all_sq += every or 0.0
        if selected is None:
            self.theirs_sq += every or 0.0
        else:
            self.theirs_sq += sum_of_squares(selected.mul_(minus_update), out=selected)
        return every if whole else None

    def add_counts(self, count: int, moving: int) -> None:
        """Add one chunk of which `count` are selected and `moving` do not stand still; for `counts_only`."""
        self.count += count
        self.moving += moving

    def _add_masked(self, minus_update: Tensor, selected: Tensor | None, gain: float) -> None:
        """Add one chunk to `masked_sq`. Overwrites `selected`."""
        if selected is None:
            selected = buffer("selected", minus_update.numel(), self.dtype).fill_(1.0)
        self.masked_sq.add(torch.addcmul(minus_update, minus_update, selected, value=gain, out=selected))

    def _moves(self, minus_update: Tensor, grad: Tensor) -> Tensor:
        """1.0 where a coordinate moves if its multiplier is not 0, 0.0 where it stands still anyhow."""
        return torch.mul(minus_update, grad, out=buffer("moves", minus_update.numel(), self.dtype)).ne_(0)

    def target(self, address: int, offset: int, minus_updates: Tensor, gradient: Gradient) -> Target:
        """The facts that the draw needs, once all chunks are added; the marks of the tensor begin at `offset`."""
        self.masked_sq.take()  # its memory is that of every tensor
        self.still = self.moving < self.numel  # else nothing has to be left out
        self.minus_updates, self.gradient = minus_updates, gradient

        def moves(start: int, end: int) -> Tensor:
            return self._moves(minus_updates[start:end], gradient(start, end))

        return Target(address, self.numel, offset, self.count, self.moving, moves)

    @property
    def _chooses(self) -> bool:
        """False if none or all are selected: then the control's coordinates are those of the policy."""
        return 0 < self.count < self.numel

    # --- the norm ---

    def scale(self, marks: Tensor, selected: float, rest: float) -> float:
        """The factor on both multipliers, `selected` and `rest`, from what the control has drawn."""
        if not self.control.norm:
            return 1.0
        if not self._chooses:
            wanted = self._wanted(selected, rest)
            return self._scale_to(wanted, wanted)
        ours = 0.0
        for start, end in backwards(self.numel):
            minus_update = self.minus_updates[start:end]
            chosen = buffer("selected", end - start, self.dtype).copy_(marks[start:end])
            if self.still:
                chosen = self._only_moving(chosen, minus_update, start)
            ours += sum_of_squares(chosen.mul_(minus_update), out=chosen)
        theirs, every = self.theirs_sq, self.all_sq
        if rest == 0:  # then `all_sq` was not added up
            every = max(theirs, ours)
        have = selected * selected * ours + rest * rest * max(every - ours, 0.0)
        return self._scale_to(have, self._wanted(selected, rest))

    @torch.inference_mode()  # as the draw
    def mask_(self, marks: Tensor, selected: float, rest: float, squared: bool) -> tuple[float, float, float]:
        """Multiply -u by the mask of what the control has drawn, up to a factor, in place. Overwrites `marks`.

        Returns the factor on both multipliers, that by which -u is still to be multiplied, and the sum of (mask u)^2
        after both; 0 for that if neither `squared` nor the norm asks for it.
        """
        marks, mask_chunk_, unit = self._masking(marks, selected, rest)
        squares = Squares()
        adds = squared or self.control.norm
        length = WIDE * chunk()
        pieces = list(zip(self.minus_updates.split(length), marks.split(length), strict=True))
        for i in range(len(pieces) - 1, -1, -1):  # backwards: the last ones are still in the cache
            minus_update, some = pieces[i]
            n = minus_update.numel()
            moves = self._moves(minus_update, self.gradient(i * length, i * length + n)) if self.still else None
            mask_chunk_(minus_update, buffer("selected", n, self.dtype).copy_(some))
            if moves is not None:
                minus_update.mul_(moves)
            if adds:
                squares.add(minus_update)
        have = squares.take() * unit * unit
        scale = 1.0
        if self.control.norm:
            scale = self._scale_to(have, have if not self._chooses else self._wanted(selected, rest))
        return scale, scale * unit, scale * scale * have

    def _masking(
        self, marks: Tensor, selected: float, rest: float
    ) -> tuple[Tensor, Callable[[Tensor, Tensor], object], float]:
        """Marks, the operation that masks -u of a chunk by them (as floats), and the factor that is left.

        It may write to `marks`.
        """
        if selected == -rest:  # the marks become signs while they are bytes
            signs = marks.view(torch.int8)
            torch.add(_minus_one(), signs, alpha=2, out=signs)
            return signs, Tensor.mul_, selected
        # With an infinite update nothing is kept, and one that is not selected must not become infinity times 0.
        if self.gain is not None and self.control.norm and math.isfinite(self.masked_sq.take()):
            return marks, functools.partial(_add_gained_, gain=self.gain), rest
        inside, unit = ((1.0, 0.0), selected) if rest == 0 else ((selected, rest), 1.0)
        multiply = Multipliers(*inside, self.dtype)
        return marks, lambda minus_update, chosen: minus_update.mul_(multiply(chosen)), unit

    def _only_moving(self, mask: Tensor, minus_update: Tensor, start: int) -> Tensor:
        """The mask of a chunk, times 0 where a coordinate stands still, in place."""
        return mask.mul_(self._moves(minus_update, self.gradient(start, start + mask.numel())))

    def _wanted(self, selected: float, rest: float) -> float:
        """The sum of (mask u)^2 of the policy."""
        if self.gain is not None:
            return rest * rest * self.masked_sq.take()
        others = max(self.all_sq - self.theirs_sq, 0.0) if rest != 0 else 0.0
        return selected * selected * self.theirs_sq + rest * rest * others

    def _scale_to(self, have: float, wanted: float) -> float:
        """The factor that turns `have`, the sum of (mask u)^2 of the control, into `wanted`, that of its policy.

        `scale_of` of the reference, in Python's float64: a tenth of the time for one number.
        """
        if not (have > 0 and math.isfinite(wanted + have)):
            return 1.0
        return min(math.sqrt(wanted / have), self.control.cap)
