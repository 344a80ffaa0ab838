"""A matched random control of one tensor: the sums of the policy's selection, then as many others, at random.

The control takes the coordinates with the largest random numbers, as many as the policy selects. As the numbers are
uniform, the last one that is taken lies within a few standard deviations of a known value. So one pass marks every
number above that bracket by its upper 8 bits, and collects the few numbers inside of it; only those are ranked. Small
tensors, and tensors whose bracket has missed, are ranked as a whole: slower, with the same answer.
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
from .chunks import buffer, count_ones, keep_marks, ones_of, spans

SMALL = 2_048  # elements; up to here the whole tensor is ranked: fewer operations than a bracket takes
WIDTH = 3.5  # half the bracket, in standard deviations of the last number's place: misses once in 2,000 tensors
SORTED = 8_192  # numbers inside of a bracket; more than so many are ranked by a bracket once more

Again = Callable[[int, int], tuple[Tensor, Tensor]]  # -u and gradient of a chunk


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

    def draw(self, again: Again, marks: Tensor, selected: float, rest: float) -> float:
        """Fill `marks` (uint8, of the whole tensor) with 1 where the control selects, else 0.

        Returns the factor on both multipliers, `selected` and `rest`.
        """
        if self.count <= 0 or self.count >= self.numel:  # the same coordinates
            marks.fill_(int(self.count > 0))
            return 1.0
        self.still = self.moving < self.numel  # else nothing has to be left out
        if self.numel <= SMALL or self.count >= self.moving or not self._by_bracket(again, marks):
            self._as_a_whole(again, marks)
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

    def _by_bracket(self, again: Again, marks: Tensor) -> bool:
        """Select by a bracket. False if the bracket has missed: then `marks` are not right."""
        low, high = self._bracket()
        count_above, inner, places, squares = 0, [], [], []
        self.ours_sq = 0.0
        for start, end in spans(self.numel):
            n = end - start
            hashes = numbers.unfinished(self.random, self.address, start, n)
            upper = numbers.upper(hashes, buffer("upper", n, torch.uint8))
            part = torch.gt(upper, high, out=marks[start:end])
            minus_update, grad = again(start, end) if self.control.norm or self.still else (None, None)
            inside = upper.sub_(low).le_(high - low)  # uint8: numbers below `low` wrap around
            if self.still:
                assert minus_update is not None
                assert grad is not None
                moves = buffer("upper moves", n, torch.uint8).copy_(self._moves(minus_update, grad))
                part.mul_(moves)
                inside.mul_(moves)
            chosen = buffer("selected", n, self.dtype).copy_(part)
            count_above += count_ones(chosen)
            place = ones_of(inside)
            inner.append(hashes.index_select(0, place))
            if self.control.norm:
                assert minus_update is not None
                self.ours_sq += float(torch.dot(chosen.mul_(minus_update), minus_update))
                squares.append(minus_update.index_select(0, place))
            places.append(place.add_(start))
        missing = self.count - count_above
        index = ranking.joined(places)
        if not 0 <= missing <= index.numel():
            return False
        if missing > 0:
            taken = self._first(ranking.joined(inner), missing)
            marks.index_fill_(0, index.index_select(0, taken), 1)
            if self.control.norm:
                some = ranking.joined(squares).index_select(0, taken)
                self.ours_sq += float(torch.dot(some, some))
        return True

    def _first(self, hashes: Tensor, count: int) -> Tensor:
        """The places in the list of the `count` largest numbers, the first of those that are equal."""
        random = numbers.finish_(hashes)
        if random.numel() <= SORTED:
            return random.sort(descending=True, stable=True).indices[:count]
        return ranking.first(random.to(torch.float32).neg_(), count)

    def _as_a_whole(self, again: Again, marks: Tensor) -> None:
        """Select by ranking the random numbers of the whole tensor."""
        t = torch.empty(self.numel, dtype=torch.float32, device="cpu")
        for start, end in spans(self.numel):
            t[start:end].copy_(numbers.finish_(numbers.unfinished(self.random, self.address, start, end - start)))
            if self.still:  # -1: after all others, in their order
                t[start:end].add_(1).mul_(self._moves(*again(start, end))).sub_(1)
        threshold = ranking.exact(t.neg_(), self.count)
        self.ours_sq = 0.0
        for start, end in spans(self.numel):
            chosen = buffer("selected", end - start, self.dtype)
            chosen.copy_(threshold.mark(t[start:end], start, t[start:end]))
            keep_marks(chosen, marks[start:end])
            if self.control.norm:
                minus_update, grad = again(start, end)
                chosen.mul_(minus_update)
                if self.still:
                    chosen.mul_(self._moves(minus_update, grad))
                self.ours_sq += float(torch.dot(chosen, minus_update))
