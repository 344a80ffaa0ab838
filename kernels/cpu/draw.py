"""The draw of matched controls: of several tensors together, as many coordinates of each as its policy selects.

Those with the largest random numbers are taken. As the numbers are uniform, the last one that is taken lies within a
few standard deviations of a known value. So one pass over the numbers marks all above that bracket by their upper 8
bits, and lists the few inside of it; only those are formed as a whole and ranked. If the bracket of a tensor misses, a
wider one is tried. Then its numbers are ranked as a whole: slower, with the same answer.

Operations are on a piece, which several tensors share: torch's operations take 5 to 50 us before they begin, because
those before them have left little of its code in the cache. What differs between tensors is a column of numbers, one
for each row of `ROW` elements.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..spec import Draw
from . import random as numbers
from . import top_k as ranking
from .chunks import CHUNK, buffer, joined, keep_marks, spans, split_ones
from .random import ROW, SAME_KEYS

SMALL = 2_048  # elements; up to here all numbers of a tensor are listed, because a bracket would hold many of them
WIDTH = 2.0  # half the bracket, in standard deviations of the last place: misses in up to 5 % of the tensors
RESCUE = 6.0  # the same of the bracket that is looked at then
PIECE = 1 << 22  # elements, whose hashes are formed together: with fewer, the calls of operations take more time


def room(numel: int) -> int:
    """The marks that a tensor of `numel` elements takes up."""
    return -(-numel // ROW) * ROW


@dataclass(eq=False)
class Target:
    """One tensor that is drawn from. Its marks are `offset` to `offset + numel` of those of all."""

    address: int
    numel: int
    offset: int
    count: int  # how many are drawn
    moving: int  # how many do not stand still
    moves: Callable[[int, int], Tensor]  # of a chunk: 0.0 where a coordinate stands still, else another number

    @property
    def still(self) -> bool:
        """True if something stands still, which is drawn after all others."""
        return self.moving < self.numel

    def bracket(self, width: float) -> tuple[int, int]:
        """The upper 8 bits, lowest and highest, that the last number which is drawn most likely has."""
        if self.numel <= SMALL:
            return 0, 255
        share = 1 - self.count / self.moving
        half = width * math.sqrt(share * (1 - share) / self.moving) + 1 / self.moving
        low, high = math.floor(256 * (share - half)), math.floor(256 * (share + half))
        return max(low, 0), min(high, 255)


Segment = tuple[Target, int, int]  # some elements of a tensor, which begin at a multiple of `ROW`


@torch.inference_mode()  # a call of an operation takes two thirds of its time
def draw(source: Draw, targets: Iterable[Target], marks: Tensor) -> None:
    """Write 1 to `marks` (uint8) where a tensor's control selects, else 0. What lies between tensors is overwritten."""
    chosen, missed = [], []
    for target in targets:
        if not 0 < target.count < target.numel:
            marks[target.offset : target.offset + target.numel].fill_(int(target.count > 0))
        else:  # where all that moves is drawn, so is some that does not
            (chosen if target.count < target.moving or not target.still else missed).append(target)
    for target in _by_brackets(source, chosen, marks, WIDTH):
        missed += _by_brackets(source, [target], marks, RESCUE)
    for target in missed:
        _as_a_whole(source, target, marks)


def _by_brackets(source: Draw, targets: list[Target], marks: Tensor, width: float) -> list[Target]:
    """Draw by brackets. Returns the tensors whose brackets have missed: their marks are not right."""
    brackets = {target: target.bracket(width) for target in targets}
    above = dict.fromkeys(targets, 0)
    listed = _List()
    for piece in _pieces(targets, PIECE):
        (first, begin, _) = piece[0]
        parts = [(target.address, a, room(b - a) // ROW) for target, a, b in piece]
        sizes = [rows * ROW for _, _, rows in parts]
        start, length = first.offset + begin, sum(sizes)
        owners = numbers.owners_of(parts)
        random = numbers.Ranking(source, parts, owners)
        drawn, inside = marks[start : start + length], random.spare
        _mark(random.upper, drawn, inside, [brackets[target] for target, _, _ in piece], owners)
        _take_back(piece, start, drawn, inside)
        for (target, _, _), count in zip(piece, _counts(drawn, sizes), strict=True):
            above[target] += count
        listed.add(random, split_ones(inside), start)
    return _rank(targets, above, listed, marks)


def _counts(marks: Tensor, sizes: list[int]) -> list[int]:
    """The numbers of marks that are set in segments of these sizes, which are multiples of `ROW`, all in few calls."""
    rows = marks.view(torch.int64).view(-1, ROW // 8).sum(1).view(torch.uint8)  # side by side, so none overflows
    if len(sizes) == 1:
        return [int(rows.sum())]
    ends = torch.tensor([end // ROW - 1 for end in itertools.accumulate(sizes)], device="cpu")
    totals = rows.view(-1, 8).sum(1).cumsum(0).index_select(0, ends).tolist()
    return [end - start for start, end in itertools.pairwise([0, *totals])]


def _pieces(targets: list[Target], length: int) -> Iterator[list[Segment]]:
    """Segments that lie side by side in the marks, up to `length` marks at a time."""
    piece: list[Segment] = []
    end = left = 0
    for target in targets:
        a = 0
        while a < target.numel:
            if piece and (left == 0 or target.offset + a != end):
                yield piece
                piece = []
            if not piece:
                left = length
            b = min(target.numel, a + left, (a // SAME_KEYS + 1) * SAME_KEYS)
            piece.append((target, a, b))
            left -= room(b - a)
            end = target.offset + a + room(b - a)
            a = b
    if piece:
        yield piece


def _mark(upper: Tensor, drawn: Tensor, inside: Tensor, brackets: list[tuple[int, int]], owners: Tensor) -> None:
    """Write 1 where the upper 8 bits are above their bracket to `drawn`, where they are in it to `inside`; else 0.

    `owners` are the places in `brackets` by row.
    """
    lows, highs = zip(*brackets, strict=True)
    low, high = (numbers.of_rows(ends, owners, torch.uint8) for ends in (lows, highs))
    upper, drawn, inside = (x.view(-1, ROW) for x in (upper, drawn, inside))
    torch.gt(upper, high, out=drawn)
    if lows == highs:
        torch.eq(upper, low, out=inside)
    else:
        torch.sub(upper, low, out=inside)  # numbers below `low` wrap around
        inside.le_(high.sub(low))


def _take_back(piece: list[Segment], start: int, drawn: Tensor, inside: Tensor) -> None:
    """Take back the marks of what lies between tensors, and of what stands still. The piece begins at `start`."""
    for target, a, b in piece:
        begin, end = target.offset + a - start, target.offset + b - start
        if (b - a) % ROW:
            drawn[end : begin + room(b - a)].zero_()
            inside[end : begin + room(b - a)].zero_()
        if target.still:
            _leave_out_still(target, a, drawn[begin:end], inside[begin:end])


def _leave_out_still(target: Target, first: int, drawn: Tensor, inside: Tensor) -> None:
    """Take back the marks of what stands still, of elements from `first` on."""
    for start, end in spans(drawn.numel()):
        moves = target.moves(first + start, first + end)
        moves = buffer("upper moves", end - start, torch.uint8).copy_(moves)
        drawn[start:end].mul_(moves)
        inside[start:end].mul_(moves)


class _List:
    """Places of marks whose numbers are inside of a bracket, and their groups' hashes, in parts that are ascending."""

    def __init__(self) -> None:
        self.places: list[Tensor] = []
        self.hashes: list[Tensor] = []
        self.lengths: list[int] = []  # of the parts

    def add(self, random: numbers.Ranking, parts: Sequence[Tensor], start: int) -> None:
        """Add places of a piece, in parts, whose first mark is `start`."""
        parts = [part for part in parts if part.numel() > 0]
        if parts:
            found = joined(parts)
            self.lengths += [part.numel() for part in parts]
            self.hashes.append(random.hashes_at(found))
            self.places.append(found.add_(start) if start else found)

    def keys(self, targets: list[Target]) -> list[list[Tensor]]:
        """The keys (`ordered`) of what is listed of each tensor, in parts."""
        if not self.places:
            return [[_nothing()] for _ in targets]
        places = joined(self.places)
        random = numbers.ranking_at(joined(self.hashes), places)
        if len(targets) == 1:
            return [[numbers.ordered(random, places)]]
        offsets = torch.tensor([target.offset for target in targets[1:]], dtype=torch.int64, device="cpu")
        sizes: list[int] = []  # of each tensor's share of each part
        for part in places.split(self.lengths):
            ends = [0, *torch.searchsorted(part, offsets).tolist(), part.numel()]
            sizes += [end - start for start, end in itertools.pairwise(ends)]
        pieces = numbers.ordered(random, places).split(sizes)
        return [list(pieces[number :: len(targets)]) for number in range(len(targets))]


@functools.cache
def _nothing() -> Tensor:
    return torch.empty(0, dtype=torch.int64, device="cpu")


def _rank(targets: list[Target], above: dict[Target, int], listed: _List, marks: Tensor) -> list[Target]:
    """Mark those in the list that are drawn, of each tensor the largest. Returns the tensors with too few or too many.

    `above` are the numbers of marks that are already set.
    """
    missed, drawn = [], []
    for target, parts in zip(targets, listed.keys(targets), strict=True):
        keys = joined(parts)
        count = target.count - above[target]
        if not 0 <= count <= keys.numel():
            missed.append(target)
        elif count > 0:
            drawn.append(keys.topk(count, sorted=False).values)
    if drawn:
        marks.index_fill_(0, numbers.places_of(joined(drawn)), 1)
    return missed


def _as_a_whole(source: Draw, target: Target, marks: Tensor) -> None:
    """Draw by ranking the random numbers of the whole tensor."""
    t = torch.empty(target.numel, dtype=torch.float32, device="cpu")
    for start, end in spans(target.numel, CHUNK):
        index = torch.arange(start, end, device="cpu")
        parts = [(target.address, start, room(end - start) // ROW)]
        random = numbers.Ranking(source, parts, numbers.owners_of(parts))
        t[start:end].copy_(numbers.ranking_at(random.hashes_at(index - start), index))
    for start, end in spans(target.numel if target.still else 0):
        # -1: after all others, in their order
        t[start:end].add_(1).mul_(target.moves(start, end)).sub_(1)
    threshold = ranking.exact(t.neg_(), target.count)
    for start, end in spans(target.numel):
        drawn = marks[target.offset + start : target.offset + end]
        keep_marks(threshold.mark(t[start:end], start, t[start:end]), drawn)
