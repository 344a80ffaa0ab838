"""A matched random control of one tensor: the sums of the policy's selection, then as many others, at random.

The control takes the coordinates with the largest random numbers, as many as the policy selects. As the numbers are
uniform, the last one that is taken lies within a few standard deviations of a known value. So one pass marks every
number above that bracket by its upper 8 bits, and collects the few numbers inside of it; only those are formed as a
whole and ranked. Small tensors, and tensors whose bracket has missed, are ranked as a whole: slower, with the same
answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..reference.control import scale_of
from ..spec import Control, Draw
from . import random as numbers
from . import top_k as ranking
from .chunks import CHUNK, buffer, count_ones, keep_marks, ones_of, spans

SMALL = 2_048  # elements; up to here the whole tensor is ranked: fewer operations than a bracket takes
WIDTH = 3.5  # half the bracket, in standard deviations of the last number's place: misses once in 2,000 tensors

WIDE = numbers.GROUP * CHUNK  # elements whose bytes are looked at together: their hashes fill one chunk's buffer

Gradient = Callable[[int, int], Tensor]  # of a chunk, from one element to another


class Matched:
    """One tensor's control: `add` each chunk with what the policy selects there, then `draw`."""

    def __init__(
        self, control: Control, rest: float, numel: int, dtype: torch.dtype, draw: Draw, address: int, still: bool
    ) -> None:
        self.control, self.rest, self.numel, self.dtype = control, rest, numel, dtype
        self.address, self.still, self.random = address, still, draw
        self.count = 0  # the number that the policy selects
        self.moving = 0 if still else numel  # the number that do not stand still
        self.theirs_sq = self.ours_sq = self.all_sq = 0.0

    def add(self, minus_update: Tensor, grad: Tensor, selected: Tensor | None) -> None:
        """Add one chunk of the policy's selection: 1.0 and 0.0, None if everything is selected."""
        n = minus_update.numel()
        self.count += n if selected is None else count_ones(selected)
        if self.still:
            moves = self._moves(minus_update, grad)
            moving = count_ones(moves)
            self.moving += moving
            if moving < n:  # those that stand still have no part in a norm
                minus_update = moves.mul_(minus_update)
        if not self.control.norm:
            return
        every = float(torch.dot(minus_update, minus_update)) if selected is None or self.rest != 0 else 0.0
        self.all_sq += every
        if selected is None:
            self.theirs_sq += every
        else:
            chosen = torch.mul(minus_update, selected, out=buffer("products", n, self.dtype))
            self.theirs_sq += float(torch.dot(chosen, minus_update))

    def _moves(self, minus_update: Tensor, grad: Tensor) -> Tensor:
        """1.0 where a coordinate moves if its multiplier is not 0, 0.0 where it stands still anyhow."""
        return torch.mul(minus_update, grad, out=buffer("moves", minus_update.numel(), self.dtype)).ne_(0)

    def draw(self, minus_updates: Tensor, gradient: Gradient, marks: Tensor, selected: float, rest: float) -> float:
        """Fill `marks` (uint8, of the whole tensor) with 1 where the control selects, else 0.

        Returns the factor on both multipliers, `selected` and `rest`.
        """
        if self.count <= 0 or self.count >= self.numel:  # the same coordinates
            marks.fill_(int(self.count > 0))
            return 1.0
        self.still = self.moving < self.numel  # else nothing has to be left out
        if self.numel <= SMALL or self.count >= self.moving or not self._by_bracket(minus_updates, gradient, marks):
            self._as_a_whole(minus_updates, gradient, marks)
        return self._scale(selected, rest) if self.control.norm else 1.0

    def _scale(self, selected: float, rest: float) -> float:
        sums = torch.tensor([self.theirs_sq, self.ours_sq, self.all_sq], dtype=torch.float64, device="cpu")
        theirs, ours, every = sums.unbind()
        if rest == 0:  # then `all_sq` was not added up
            every = torch.maximum(theirs, ours)
        wanted = selected * selected * theirs + rest * rest * (every - theirs).clamp(min=0)
        have = selected * selected * ours + rest * rest * (every - ours).clamp(min=0)
        return float(scale_of(self.control, wanted, have))

    # --- the selection ---

    def _bracket(self) -> tuple[int, int]:
        """The upper 8 bits, lowest and highest, that the last number which is selected most likely has."""
        share = 1 - self.count / self.moving
        half = WIDTH * math.sqrt(share * (1 - share) / self.moving) + 1 / self.moving
        low, high = math.floor(256 * (share - half)), math.floor(256 * (share + half))
        return max(low, 0), min(high, 255)

    def _by_bracket(self, minus_updates: Tensor, gradient: Gradient, marks: Tensor) -> bool:
        """Select by a bracket. False if the bracket has missed: then `marks` are not right."""
        low, high = self._bracket()
        above, self.ours_sq = 0, 0.0
        places, hashes = [], []
        for first, last in spans(self.numel, WIDE):
            random = numbers.Ranking(self.random, self.address, first, last - first)
            torch.gt(random.upper, high, out=marks[first:last])
            inside = torch.sub(random.upper, low, out=buffer("inside", last - first, torch.uint8))
            inside.le_(high - low)  # uint8: numbers below `low` wrap around
            for start, end in spans(last - first):
                within = slice(first + start, first + end)
                above += self._above(minus_updates[within], gradient, marks[within], inside[start:end], within.start)
            place = ones_of(inside)
            hashes.append(random.hashes_at(place))
            places.append(place.add_(first))
        missing, index = self.count - above, ranking.joined(places)
        if not 0 <= missing <= index.numel():
            return False
        if missing > 0:
            taken = index.index_select(0, self._first(numbers.ranking_at(ranking.joined(hashes), index), missing))
            marks.index_fill_(0, taken, 1)
            if self.control.norm:
                some = minus_updates.index_select(0, taken)
                self.ours_sq += float(torch.dot(some, some))
        return True

    def _above(self, minus_update: Tensor, gradient: Gradient, above: Tensor, inside: Tensor, start: int) -> int:
        """Count the marks `above` of one chunk and add up its squares. Marks of what stands still are taken back."""
        n = minus_update.numel()
        if self.still:
            moves = buffer("upper moves", n, torch.uint8).copy_(self._moves(minus_update, gradient(start, start + n)))
            above.mul_(moves)
            inside.mul_(moves)
        chosen = buffer("selected", n, self.dtype).copy_(above)
        count = count_ones(chosen)
        if self.control.norm:
            self.ours_sq += float(torch.dot(chosen.mul_(minus_update), minus_update))
        return count

    def _first(self, random: Tensor, count: int) -> Tensor:
        """The places in the list of the `count` largest numbers, the first of those that are equal. Ascending."""
        size = random.numel()
        # No two keys are equal: below the number, which has 24 bits, stands the place from the end.
        keys = random.to(torch.int64).bitwise_left_shift_(32).add_(torch.arange(size - 1, -1, -1, device="cpu"))
        return torch.nonzero(keys >= keys.kthvalue(size - count + 1).values).view(-1)

    def _as_a_whole(self, minus_updates: Tensor, gradient: Gradient, marks: Tensor) -> None:
        """Select by ranking the random numbers of the whole tensor."""
        t = torch.empty(self.numel, dtype=torch.float32, device="cpu")
        for start, end in spans(self.numel):
            index = torch.arange(start, end, device="cpu")
            random = numbers.Ranking(self.random, self.address, start, end - start)
            t[start:end].copy_(numbers.ranking_at(random.hashes_at(index - start), index))
            if self.still:  # -1: after all others, in their order
                t[start:end].add_(1).mul_(self._moves(minus_updates[start:end], gradient(start, end))).sub_(1)
        threshold = ranking.exact(t.neg_(), self.count)
        self.ours_sq = 0.0
        for start, end in spans(self.numel):
            chosen, minus_update = buffer("selected", end - start, self.dtype), minus_updates[start:end]
            chosen.copy_(threshold.mark(t[start:end], start, t[start:end]))
            keep_marks(chosen, marks[start:end])
            if self.control.norm:
                chosen.mul_(minus_update)
                if self.still:
                    chosen.mul_(self._moves(minus_update, gradient(start, end)))
                self.ours_sq += float(torch.dot(chosen, minus_update))
