"""A matched random control of one tensor: the sums of the policy's selection, then as many others, at random.

Once it is known how many are to be chosen, the place of the last of them among the random numbers is known as well, up
to a few standard deviations, because the numbers are uniform. So one pass marks everything above that bracket by the
upper 8 bits of its number, and collects what lies inside of it, which alone is ranked. Small tensors, and those whose
bracket has missed, are ranked as a whole: slower, the same answer.
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
from .chunks import buffer, keep_marks, spans

SMALL = 2_048  # elements; up to here the whole tensor is ranked: fewer operations than a bracket takes
WIDTH = 3.5  # half the bracket, in standard deviations of the last number's place: misses once in 2,000 tensors
SORTED = 8_192  # numbers inside of a bracket; more than so many are ranked by a bracket once more

Again = Callable[[int, int], tuple[Tensor, Tensor]]  # direction and gradient of a chunk


class Matched:
    """One tensor's control: `add` each chunk with what the policy selects there, then `draw`."""

    def __init__(
        self, control: Control, rest: float, numel: int, dtype: torch.dtype, draw: Draw, address: int, still: bool
    ) -> None:
        self.control, self.rest, self.numel, self.dtype = control, rest, numel, dtype
        self.address, self.still, self.random = address, still, draw
        self.count = 0  # how many the policy selects
        self.moving = 0 if still else numel  # how many do not stand still
        self.theirs_sq = self.ours_sq = self.all_sq = 0.0

    def add(self, direction: Tensor, grad: Tensor, selected: Tensor | None) -> None:
        """One chunk of the policy's selection: 1.0 and 0.0, None where everything is selected."""
        n = direction.numel()
        self.count += n if selected is None else _ones(selected)
        if self.still:
            moves = self._moves(direction, grad)
            moving = _ones(moves)
            self.moving += moving
            if moving < n:  # the others have no part in a norm
                direction = moves.mul_(direction)
        if not self.control.norm:
            return
        every = float(torch.dot(direction, direction)) if selected is None or self.rest != 0 else 0.0
        self.all_sq += every
        if selected is None:
            self.theirs_sq += every
        else:
            chosen = torch.mul(direction, selected, out=buffer("products", n, self.dtype))
            self.theirs_sq += float(torch.dot(chosen, direction))

    def _moves(self, direction: Tensor, grad: Tensor) -> Tensor:
        """1.0 where a coordinate moves whatever is selected, 0.0 where it stands still."""
        return torch.mul(direction, grad, out=buffer("moves", direction.numel(), self.dtype)).ne_(0)

    def draw(self, again: Again, marks: Tensor, above: float, below: float) -> float:
        """Fill `marks` (uint8, of the whole tensor) with 1 where the control selects, else 0.

        Returns what both multipliers, of the selected and of the rest, are to be scaled by.
        """
        if self.count <= 0 or self.count >= self.numel:  # the same coordinates
            marks.fill_(int(self.count > 0))
            return 1.0
        self.still = self.moving < self.numel  # else nobody has to be left out
        if self.numel <= SMALL or self.count >= self.moving or not self._by_bracket(again, marks):
            self._as_a_whole(again, marks)
        return self._scale(above, below) if self.control.norm else 1.0

    def _scale(self, above: float, below: float) -> float:
        sums = torch.tensor([self.theirs_sq, self.ours_sq, self.all_sq], dtype=torch.float64, device="cpu")
        theirs, ours, every = sums.unbind()
        if below == 0:  # then `all_sq` was not asked for
            every = torch.maximum(theirs, ours)
        wanted = above * above * theirs + below * below * (every - theirs).clamp(min=0)
        have = above * above * ours + below * below * (every - ours).clamp(min=0)
        return float(scale_of(self.control, wanted, have))

    # --- which ones ---

    def _bracket(self) -> tuple[int, int]:
        """Upper 8 bits of a number between which the last one that is selected lies, most likely."""
        share = 1 - self.count / self.moving
        half = WIDTH * math.sqrt(share * (1 - share) / self.moving) + 1 / self.moving
        low, high = math.floor(256 * (share - half)), math.floor(256 * (share + half))
        return max(low, 0), min(high, 255)

    def _by_bracket(self, again: Again, marks: Tensor) -> bool:
        """Whether the bracket has hit: then everything is done."""
        low, high = self._bracket()
        above, found, places, squares = 0, [], [], []
        self.ours_sq = 0.0
        for start, end in spans(self.numel):
            n = end - start
            hashes = numbers.unfinished(self.random, self.address, start, n)
            upper = numbers.upper(hashes, buffer("upper", n, torch.uint8))
            part = torch.gt(upper, high, out=marks[start:end])
            direction, grad = again(start, end) if self.control.norm or self.still else (None, None)
            inside = upper.sub_(low).le_(high - low)  # uint8: what is below `low` wraps around
            if self.still:
                assert direction is not None
                assert grad is not None
                moves = buffer("upper moves", n, torch.uint8).copy_(self._moves(direction, grad))
                part.mul_(moves)
                inside.mul_(moves)
            chosen = buffer("selected", n, self.dtype).copy_(part)
            above += _ones(chosen)
            place = ones_of(inside)
            found.append(hashes.index_select(0, place))
            if self.control.norm:
                assert direction is not None
                self.ours_sq += float(torch.dot(chosen.mul_(direction), direction))
                squares.append(direction.index_select(0, place))
            places.append(place.add_(start))
        missing = self.count - above
        index = _joined(places)
        if not 0 <= missing <= index.numel():
            return False
        if missing > 0:
            taken = self._first(_joined(found), index, missing)
            marks.index_fill_(0, index.index_select(0, taken), 1)
            if self.control.norm:
                some = _joined(squares).index_select(0, taken)
                self.ours_sq += float(torch.dot(some, some))
        return True

    def _first(self, hashes: Tensor, index: Tensor, count: int) -> Tensor:
        """Places of the `count` largest numbers in a list of hashes, the lower index first among equals."""
        found = numbers.finish_(hashes)
        if found.numel() <= SORTED:
            return found.sort(descending=True, stable=True).indices[:count]
        return ranking.first(found.to(torch.float32).neg_(), index, count, self.numel)

    def _as_a_whole(self, again: Again, marks: Tensor) -> None:
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
                direction, grad = again(start, end)
                chosen.mul_(direction)
                if self.still:
                    chosen.mul_(self._moves(direction, grad))
                self.ours_sq += float(torch.dot(chosen, direction))


def _ones(marks: Tensor) -> int:
    """How many of a chunk's marks are 1.0, the others being 0.0: half the time of a sum."""
    return int(torch.dot(marks, marks))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def ones_of(marks: Tensor) -> Tensor:
    """Where uint8 marks are not 0, for marks that are few: eight of them are looked at together."""
    whole = marks.numel() // 8 * 8
    words = torch.nonzero(marks[:whole].view(torch.int64)).view(-1)
    inside = torch.nonzero(marks[:whole].view(-1, 8).index_select(0, words))
    found = words.index_select(0, inside[:, 0]).mul_(8).add_(inside[:, 1])
    return found if whole == marks.numel() else torch.cat([found, torch.nonzero(marks[whole:]).view(-1) + whole])
