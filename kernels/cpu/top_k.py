"""The exact K-th score without sorting the tensor: bracket, collect, settle.

Scores are ranked by `t = -score`, so that the K largest scores are the K smallest t, and NaN stays out of every
comparison. A `Threshold(value, cutoff)` selects `t < value`, and those equal to it at flat indices up to `cutoff`. As
+0 equals -0 in a comparison, ties are what docs/reference/kernels.md calls ties.

A sample gives two values around the wanted rank: the bracket. One pass counts the t below the bracket and collects
those inside; the K-th is then found among these few. If it is not one of them (the bracket missed), the whole tensor
is ranked instead: slower, with the same answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import chunks
from .chunks import buffer, count_marks, count_ones, joined, ones_of, rounded, scattered_ones, spans

WIDTH = 2.0  # half the bracket, in standard deviations of the sample's rank: misses in 5 % of the tensors
RESCUE = 6.0  # the same of the bracket that is looked at then, on the side on which the first one has missed
SAMPLE = 16_384  # the fewest scores that a bracket is made of; 4 times as many at most
SHARE = 32  # one score in so many is sampled, between these limits
SHORT = 4_096  # values; up to here a plain `nonzero` takes less time than many small operations
FEW = 4_096  # values; in a list of up to so many, `kthvalue` takes no longer than bins
BINS = 256  # of a list
NARROWEST = 1e-30  # the width of a bracket; of a narrower one, a bin's width may be rounded to nothing
INNER = 512  # the fewest values that the bracket of a list is made of
TOGETHER = 8  # chunks of one thread whose marks are looked through together: long enough for torch to divide them
RUN = 32  # neighbours taken together: two cache lines of float32, which memory hands out nearly as fast as one


@dataclass(frozen=True)
class Threshold:
    """The selected of a tensor: `t < value`, and `t == value` at flat indices up to `cutoff`."""

    value: float
    cutoff: int  # ties at this flat index and before are selected

    def mark(self, t: Tensor, start: int, out: Tensor) -> Tensor:
        """Write 1.0 where selected, else 0.0, to `out`, for the elements from `start` on. `out` may be `t`."""
        split = self.cutoff + 1 - start
        if split <= 0:
            return torch.lt(t, self.value, out=out)
        if split >= t.numel():
            return torch.le(t, self.value, out=out)
        torch.le(t[:split], self.value, out=out[:split])
        torch.lt(t[split:], self.value, out=out[split:])
        return out


def _count_below(t: Tensor, value: float) -> int:
    """The number of elements of `t` that are smaller than `value`."""
    return sum([count_ones(torch.lt(x, value, out=buffer("below", x.numel(), t.dtype))) for x in _pieces(t)])


def _count_up_to(t: Tensor, value: float) -> int:
    """The number of elements of `t` that are not greater than `value`; NaN is."""
    return sum([count_ones(torch.le(x, value, out=buffer("below", x.numel(), t.dtype))) for x in _pieces(t)])


def _pieces(t: Tensor) -> tuple[Tensor, ...]:
    return (t,) if t.numel() <= chunks.chunk() else t.split(chunks.chunk())


def _places(t: Tensor, lower: float, upper: float) -> Tensor:
    """The indices at which a chunk is in `[lower, upper]`, ascending."""
    n = t.numel()
    within = torch.clamp(t, lower, upper, out=buffer("below", n, t.dtype)).eq_(t)  # NaN is not equal to itself
    return ones_of(buffer("inside", n, torch.bool).copy_(within))


def _inside(t: Tensor, lower: float, upper: float) -> Tensor:
    """The indices at which a list of any length is in `[lower, upper]`, ascending."""
    if t.numel() <= SHORT:
        return torch.nonzero((t >= lower) & (t <= upper)).view(-1)
    return joined([_places(t[start:end], lower, upper).add_(start) for start, end in spans(t.numel())])


class Counted:
    """Values with the number of elements of a list that are smaller, from which others are found.

    Ranks are taken to grow evenly from one counted value to the next. What that is wrong by is seen when the new value
    is counted, so a few turns are enough.
    """

    def __init__(self, t: Tensor, points: list[tuple[float, int]]) -> None:
        self.t, self.points = t, points  # ascending

    def at(self, rank: float, slack: float) -> tuple[float, int] | None:
        """A value with `rank` smaller elements, give or take `slack`, and its count; None if a few turns find none."""
        for _ in range(4):
            after = next((i for i, (_, count) in enumerate(self.points) if count >= rank), 0)
            if after == 0:
                return None
            (a, below_a), (b, below_b) = self.points[after - 1], self.points[after]
            x = a + (b - a) * (rank - below_a) / (below_b - below_a)
            x = x if self.t.dtype == torch.float64 else rounded(x)  # a number that t can be
            if not a < x < b:
                return None
            count = _count_below(self.t, x)
            if abs(count - rank) <= slack:
                return x, count
            self.points.insert(after, (x, count))
        return None


def _kthvalue(t: Tensor, rank: int) -> float:
    return float(torch.kthvalue(t, rank).values)


def smallest(t: Tensor, ranks: tuple[int, ...]) -> list[float]:
    """The values at these ranks of `t` (from 1, ascending; NaN is the largest), as `kthvalue` has them.

    Found by brackets within brackets: torch's kthvalue takes 8 to 15 ns an element (1.1 ms for 126k). To compare, and
    to keep the values inside of a bracket, takes a fifth of that.
    """
    n = t.numel()
    if n >= 16 * INNER:
        sample = t[:: n // max(INNER, n // 64)]
        m = sample.numel()
        margin = 6 * math.sqrt(m / 4) + 1
        lower, upper = _around(sample, min(ranks) / n * m - margin, max(ranks) / n * m + margin)
        below = _count_below(t, lower)
        inside = t.index_select(0, _inside(t, lower, upper))
        if all(1 <= rank - below <= inside.numel() for rank in ranks):
            t, ranks = inside, tuple(rank - below for rank in ranks)
    return [_kthvalue(t, rank) for rank in ranks]


def _around(sample: Tensor, low: float, high: float) -> tuple[float, float]:
    """The values of a sample at rank `low` or a little below, and at `high` or a little above.

    Infinite where there is no such rank, and where the value is NaN.
    """
    n, first, last = sample.numel(), math.floor(low), math.ceil(high)
    inner = tuple(rank for rank in (first, last) if 1 <= rank <= n)
    values = iter([math.inf if math.isnan(x) else x for x in smallest(sample, inner)] if inner else [])
    lower = next(values) if 1 <= first <= n else -math.inf if first < 1 else math.inf
    return lower, next(values) if 1 <= last <= n else math.inf


def _settle(t: Tensor, rank: int) -> tuple[float, int]:
    """The value at this rank of `t`, NaN being the largest, and the place of the last that is taken of its equals."""
    value = smallest(t, (rank,))[0]
    ties = _inside(t, value, value)
    return value, int(ties[rank - _count_below(t, value) - 1])


def first(t: Tensor, k: int) -> Tensor:
    """The places in `t` of its `k` smallest values (1 <= k <= len(t)), the first of those that are equal."""
    value, last = _settle(t, k)
    threshold = Threshold(value, last)
    return torch.nonzero(threshold.mark(t, 0, torch.empty_like(t))).view(-1)


def exact(t: Tensor, k: int) -> Threshold:
    """The threshold that selects the `k` smallest of `t`, a whole tensor, 1-d."""
    valid = _count_up_to(t, math.inf)
    if k <= 0:
        return Threshold(-math.inf, -1)
    if k >= valid:
        return Threshold(math.inf, t.numel())
    return Threshold(*_settle(t, k))


def bracket(sample: Tensor, k: int, numel: int, width: float) -> tuple[float, float]:
    """Two values between which the K-th smallest t most likely lies: `width` standard deviations to either side.

    `sample` is t at some positions, in runs of `RUN` neighbours. Neighbours may be alike, so the deviation of a rank is
    measured on the runs. It is not taken for smaller than that of independent numbers. The ranks of the two in the
    sample are right to 40 % of the width, and most often to 10 %: exact ones take five times as long.
    """
    n, share = sample.numel(), k / numel
    wanted, deviation = share * n, math.sqrt(n * share * (1 - share))
    known = None
    if n >= 8 * INNER:
        few = sample[:: n // INNER].contiguous()
        reach = 1.2 * width * math.sqrt(few.numel() / 4) + 1
        ranks = [min(max(round(share * few.numel() + x), 1), few.numel()) for x in (-reach, 0, reach)]
        first, middle, last = (_kthvalue(few, rank) for rank in ranks)
        ends = (first, _count_below(sample, first)), (last, _count_below(sample, last))
        below = torch.lt(sample, middle, out=buffer("below", n, sample.dtype))
        known = Counted(sample, [ends[0], (middle, count_ones(below)), ends[1]])
        runs = below.view(-1, RUN).sum(1)
        deviation = max(deviation, math.sqrt(runs.numel()) * float(runs.std()))
    margin = width * deviation + 1
    if known is not None:
        slack = 0.4 * margin
        lower, upper = known.at(wanted - margin, slack), known.at(wanted + margin, slack)
        if lower is not None and upper is not None:
            return lower[0], upper[0]
    return _around(sample, wanted - margin, wanted + margin)


class Collector:
    """Marks, chunk by chunk, the t below the bracket, and collects those inside.

    Chunks come one after the other. The caller writes t of a chunk to its `room`, and calls `add`. `whole` is memory
    for t of the whole tensor, if the caller has that; the room is a part of it then. `marks` is memory for the
    selection, one byte an element, if the caller reads it: `mark` completes it.
    """

    def __init__(
        self,
        k: int,
        numel: int,
        lower: float,
        upper: float,
        whole: Tensor | None = None,
        marks: Tensor | None = None,
    ) -> None:
        self.k, self.numel, self.lower, self.upper, self.whole = k, numel, lower, upper, whole
        self.marks = marks
        self.everything = lower == -math.inf and upper == math.inf  # of a small tensor
        self.below = 0
        self.is_below = self.is_inside = torch.empty(0, dtype=torch.bool, device="cpu")
        self.begun = self.done = 0  # the chunks from `begun` to `done` are added, and not looked through
        self.values: list[Tensor] = []
        self.indices: list[Tensor] = []

    def room(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """Memory for t of the chunk `[start, end)`."""
        if self.whole is not None:
            return self.whole[start:end]
        if self.everything:
            return buffer("selected", end - start, dtype)
        return buffer("scores", TOGETHER * chunks.CHUNK, dtype)[start - self.begun : end - self.begun]

    def add(self, t: Tensor, start: int) -> None:
        """Add one chunk, whose first element is element `start`. `t` is in its `room`."""
        count = t.numel()
        if self.everything:
            self.values.append(t.clone())
            self.indices.append(torch.arange(start, start + count, device="cpu"))
            return
        if start == self.begun:
            self._begin(max(count, min(TOGETHER * chunks.CHUNK, self.numel)))
        first, last = start - self.begun, start - self.begun + count
        # Operations whose result is bool are five times slower here than those on floats, so: float first.
        compared = buffer("below", count, t.dtype)
        self.is_below[first:last].copy_(torch.lt(t, self.lower, out=compared))
        self.is_inside[first:last].copy_(torch.le(t, self.upper, out=compared))  # NaN is in neither
        self.done = start + count
        if self.done == self.numel or last > self.is_inside.numel() - chunks.chunk():
            self._look_through(self.is_below[:last].view(torch.uint8), self.is_inside[:last].view(torch.uint8), t.dtype)

    def _begin(self, length: int) -> None:
        """Begin with chunks that are looked through together: `length` elements at most."""
        marks = buffer("below marks", length, torch.uint8) if self.marks is None else self.marks[self.begun :]
        self.is_below = marks.view(torch.bool)
        self.is_inside = buffer("inside", length, torch.uint8).view(torch.bool)

    def _look_through(self, below: Tensor, inside: Tensor, dtype: torch.dtype) -> None:
        """Count what is below the bracket, and move what is inside to the lists. `inside` also has what is below."""
        self.below += count_marks(below)
        places = scattered_ones(inside.bitwise_xor_(below))
        self.values.append(self.room(self.begun, self.done, dtype).index_select(0, places))
        self.indices.append(places.add_(self.begun))
        self.begun = self.done

    def settle(self) -> Threshold | None:
        """The threshold; None if the bracket has missed."""
        t, indices, rank = joined(self.values), joined(self.indices), self.k - self.below
        self.values, self.indices = [t], [indices]
        valid = _count_up_to(t, math.inf) if self.everything else t.numel()  # where all is collected, NaN is, too
        if not 1 <= rank <= valid:
            return None
        value = self._value(t, rank)
        if _count_up_to(t, value) == rank:
            return Threshold(value, self.numel)
        ties = indices.index_select(0, _inside(t, value, value))
        return Threshold(value, int(ties.kthvalue(rank - _count_below(t, value)).values))

    def _value(self, t: Tensor, rank: int) -> float:
        """The value at this rank of the list.

        Bins of equal width say where it is, so that only what is in its own bin is ranked. All are rounded alike:
        a larger t is never in a lower bin.
        """
        width = self.upper - self.lower
        if t.numel() <= FEW or not NARROWEST < width < 1 / NARROWEST:
            return smallest(t, (rank,))[0]
        bins = torch.sub(t, self.lower).mul_(BINS / width).to(torch.int32)
        up_to = torch.bincount(bins).cumsum(0)
        its = int(torch.searchsorted(up_to, rank))
        smaller = int(up_to[its - 1]) if its else 0
        return smallest(t.index_select(0, torch.nonzero(bins == its).view(-1)), (rank - smaller,))[0]

    def mark(self, threshold: Threshold) -> None:
        """Complete `marks`, given what `settle` has returned."""
        assert self.marks is not None
        (t,), (indices,) = self.values, self.indices
        chosen = t <= threshold.value
        if threshold.cutoff < self.numel:
            chosen.logical_and_((t < threshold.value).logical_or_(indices <= threshold.cutoff))
        self.marks.scatter_(0, indices, chosen.view(torch.uint8))

    def beside(self, lower: float, upper: float) -> Collector:
        """A collector of the side on which this one has missed, up to the ends of a wider bracket."""
        ends = (lower, self.lower) if self.k <= self.below else (self.upper, upper)
        return Collector(self.k, self.numel, *ends, self.whole, self.marks)


def bracket_runs(numel: int) -> Tensor:
    """The numbers of the aligned runs of `RUN` neighbours that the bracket is made from: spread evenly, int64."""
    runs, available = min(max(numel // SHARE, SAMPLE), 4 * SAMPLE) // RUN, numel // RUN
    # By way of float64: a division of integers takes ten times as long.
    numbers = torch.arange(runs, dtype=torch.float64, device="cpu")
    return numbers.mul_((available - 1) / (runs - 1)).to(torch.int64)


def _by(collector: Collector) -> Threshold | None:
    """The threshold, from a collector that has all t of the tensor; None if its bracket has missed."""
    assert collector.whole is not None
    for start, end in spans(collector.numel):
        collector.add(collector.whole[start:end], start)
    return collector.settle()


def top_k(score: Tensor, k: int) -> Tensor:
    """`selective.kernels.top_k` on the CPU."""
    t = score.detach().reshape(-1).to(torch.float64 if score.dtype == torch.float64 else torch.float32).neg()
    numel = t.numel()
    threshold: Threshold | None = None
    if numel > 4 * SAMPLE and 0 < k < numel:
        sample = t[: numel // RUN * RUN].view(-1, RUN).index_select(0, bracket_runs(numel)).view(-1)
        collector = Collector(k, numel, *bracket(sample, k, numel, WIDTH), t)
        threshold = _by(collector) or _by(collector.beside(*bracket(sample, k, numel, RESCUE)))
    if threshold is None:
        threshold = exact(t, k)
    return threshold.mark(t, 0, t).to(torch.bool).reshape(score.shape)
