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
from .chunks import buffer, count_ones, ones_of, scattered_ones, spans

WIDTH = 2.0  # half the bracket, in standard deviations of the sample's rank: misses in 5 % of the tensors
RESCUE = 6.0  # the same of the bracket that is looked at then, on the side on which the first one has missed
SAMPLE = 16_384  # the fewest scores that a bracket is made of; 4 times as many at most
SHARE = 32  # one score in so many is sampled, between these limits
SHORT = 4_096  # values; up to here a plain `nonzero` takes less time than many small operations
INNER = 512  # the fewest values that the bracket of a list is made of
TOGETHER = 4  # chunks whose marks are looked through together: long enough for torch to divide among its threads
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
    return sum(count_ones(torch.lt(x, value, out=buffer("below", x.numel(), t.dtype))) for x in _pieces(t))


def _count_up_to(t: Tensor, value: float) -> int:
    """The number of elements of `t` that are not greater than `value`; NaN is."""
    return sum(count_ones(torch.le(x, value, out=buffer("below", x.numel(), t.dtype))) for x in _pieces(t))


def _pieces(t: Tensor) -> tuple[Tensor, ...]:
    return (t,) if t.numel() <= chunks.CHUNK else t.split(chunks.CHUNK)


def _mark_inside(t: Tensor, lower: float, upper: float, marks: Tensor) -> Tensor:
    """Write where a chunk is in `[lower, upper]` to `marks`, bool. NaN is not."""
    n = t.numel()
    # Operations whose result is bool are five times slower here than those on floats, so: float first.
    return marks.copy_(
        torch.clamp(t, lower, upper, out=buffer("below", n, t.dtype)).eq_(t)
    )  # NaN is not equal to itself


def _places(t: Tensor, lower: float, upper: float) -> Tensor:
    """The indices at which a chunk is in `[lower, upper]`, ascending."""
    return ones_of(_mark_inside(t, lower, upper, buffer("inside", t.numel(), torch.bool)))


def _inside(t: Tensor, lower: float, upper: float) -> Tensor:
    """The indices at which a list of any length is in `[lower, upper]`, ascending."""
    if t.numel() <= SHORT:
        return torch.nonzero((t >= lower) & (t <= upper)).view(-1)
    parts = [_places(t[start:end], lower, upper).add_(start) for start, end in spans(t.numel())]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
            x = float(torch.tensor(x, dtype=self.t.dtype, device="cpu"))  # a number that t can be
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
    sample are right to a tenth of the width: exact ones take five times as long.
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
        lower, upper = known.at(wanted - margin, margin / 10), known.at(wanted + margin, margin / 10)
        if lower is not None and upper is not None:
            return lower[0], upper[0]
    return _around(sample, wanted - margin, wanted + margin)


class Collector:
    """Counts, chunk by chunk, the t below the bracket, and collects those inside.

    Chunks come one after the other. The caller writes t of a chunk to its `room`, and calls `add`. `whole` is memory
    for t of the whole tensor, if the caller has that; the room is a part of it then.
    """

    def __init__(self, k: int, numel: int, lower: float, upper: float, whole: Tensor | None = None) -> None:
        self.k, self.numel, self.lower, self.upper, self.whole = k, numel, lower, upper, whole
        self.everything = lower == -math.inf and upper == math.inf  # of a small tensor
        self.below = 0
        self.begun = self.done = 0  # the chunks from `begun` to `done` are marked, and not looked through
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
        within = buffer("below", count, t.dtype)
        if self.lower > -math.inf:
            self.below += count_ones(torch.lt(t, self.lower, out=within))
        marks = self._marks(max(TOGETHER * chunks.CHUNK, count))
        _mark_inside(t, self.lower, self.upper, marks[start - self.begun : start - self.begun + count])
        self.done = start + count
        if self.done - self.begun + chunks.CHUNK > marks.numel() or self.done == self.numel:
            self._look_through(marks[: self.done - self.begun], t.dtype)

    def _marks(self, count: int) -> Tensor:
        return buffer("inside", count, torch.bool)

    def _look_through(self, marks: Tensor, dtype: torch.dtype) -> None:
        """Move what is inside of the bracket to the lists."""
        places = scattered_ones(marks)
        self.values.append(self.room(self.begun, self.done, dtype).index_select(0, places))
        self.indices.append(places.add_(self.begun))
        self.begun = self.done

    def settle(self) -> Threshold | None:
        """The threshold; None if the bracket has missed."""
        t, indices, rank = joined(self.values), joined(self.indices), self.k - self.below
        valid = _count_up_to(t, math.inf) if self.everything else t.numel()  # where all is collected, NaN is, too
        if not 1 <= rank <= valid:
            return None
        places, smaller = _near(Counted(t, [(self.lower, 0), (self.upper, valid)]), rank)
        if places is not None:
            t, indices = t.index_select(0, places), indices.index_select(0, places)
        value = smallest(t, (rank - smaller,))[0]
        ties = indices.index_select(0, _inside(t, value, value))
        last = rank - smaller - _count_below(t, value)
        return Threshold(value, int(ties.kthvalue(last).values))

    def beside(self, lower: float, upper: float) -> Collector:
        """A collector of the side on which this one has missed, up to the ends of a wider bracket."""
        ends = (lower, self.lower) if self.k <= self.below else (self.upper, upper)
        return Collector(self.k, self.numel, *ends, self.whole)


def joined(parts: list[Tensor]) -> Tensor:
    """The parts one after the other; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _near(known: Counted, rank: int) -> tuple[Tensor | None, int]:
    """The places of a list's elements near this rank, and the number of smaller ones; None if not easily told."""
    t = known.t
    reach = max(16.0, t.numel() / 256)
    if t.numel() <= SHORT:
        return None, 0
    lower, upper = known.at(rank - 1 - reach, reach), known.at(rank + reach, reach)
    if lower is None or upper is None:
        return None, 0
    return _inside(t, lower[0], upper[0]), lower[1]


def bracket_runs(numel: int) -> Tensor:
    """The numbers of the aligned runs of `RUN` neighbours that the bracket is made from: spread evenly, int64."""
    runs, available = min(max(numel // SHARE, SAMPLE), 4 * SAMPLE) // RUN, numel // RUN
    return torch.arange(runs, device="cpu") * (available - 1) // (runs - 1)


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
