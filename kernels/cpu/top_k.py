"""The exact K-th score without sorting the tensor: bracket, collect, settle.

Scores are ranked by `t = -score`, so that the K largest scores are the K smallest t, and NaN stays out of every
comparison. A `Threshold(value, cutoff)` selects `t < value`, and those equal to it at flat indices up to `cutoff`. As
+0 equals -0 in a comparison, ties are what docs/design.md calls ties.

A sample gives two quantiles around the wanted rank: the bracket. One pass counts the t below the bracket and collects
those inside; the K-th is then found among these few. If it is not one of them (the bracket missed), the whole tensor
is ranked instead: slower, with the same answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .chunks import buffer, spans

WIDTH = 3.0  # half the bracket, in standard deviations of the sample's rank: misses in 0.3 % of the tensors
SAMPLE = 16_384  # scores the bracket is made of; neighbours are alike, so the spread is taken as if there were fewer
SPREAD = 1.5
INNER = 2_048  # values that the bracket of a list is made of
RUN = 16  # neighbours taken together: one cache line of float32


@dataclass(frozen=True)
class Threshold:
    """The selected of a tensor: `t < value`, and `t == value` at flat indices up to `cutoff`."""

    value: float
    cutoff: int  # ties at this flat index and before are selected

    def mark(self, t: Tensor, start: int, out: Tensor) -> Tensor:
        """Write 1.0 where selected, else 0.0, to `out`, for the elements from `start` on. `out` may be `t`."""
        split = min(max(self.cutoff + 1 - start, 0), t.numel())
        torch.le(t[:split], self.value, out=out[:split])
        torch.lt(t[split:], self.value, out=out[split:])
        return out


def smallest(t: Tensor, ranks: tuple[int, ...]) -> list[float]:
    """The values at these ranks of `t` (from 1, ascending; NaN is the largest), as `kthvalue` has them.

    Found by a bracket once more: torch's kthvalue takes 8 ns an element (0.18 ms for 16k, 1.1 ms for 126k), which was a
    third of a step. To compare, and to keep the values inside of a bracket, takes a fifth of that.
    """
    n = t.numel()
    if n >= 4 * INNER:
        sample = t[:: n // INNER].sort().values
        m = sample.numel()
        margin = 2 * WIDTH * math.sqrt(m / 4) + 1
        low, high = math.floor(min(ranks) / n * m - margin), math.ceil(max(ranks) / n * m + margin)
        lower = float(sample[low - 1]) if low >= 1 else -math.inf
        upper = float(sample[high - 1]) if high <= m else math.inf
        below = int((t < lower).sum())
        inside = t[(t >= lower) & (t <= upper)]
        if all(1 <= rank - below <= inside.numel() for rank in ranks):
            t, ranks = inside, tuple(rank - below for rank in ranks)
    return [float(torch.kthvalue(t, rank).values) for rank in ranks]


def _settle(t: Tensor, indices: Tensor | None, rank: int, numel: int) -> Threshold:
    """The threshold that selects the `rank` smallest of `t` (1 <= rank <= the number that are not NaN)."""
    value = smallest(t, (rank,))[0]
    ties = torch.nonzero(t == value).view(-1)
    wanted = rank - int((t < value).sum())
    if wanted >= ties.numel():
        return Threshold(value, numel)
    place = ties[wanted - 1]
    return Threshold(value, int(place if indices is None else indices[place]))


def first(t: Tensor, indices: Tensor, k: int, numel: int) -> Tensor:
    """The places in `t` of its `k` smallest values (1 <= k <= len(t)), the lower index first among equals.

    `indices` has the index of each value in a tensor of `numel` elements, ascending.
    """
    threshold = _settle(t, indices, k, numel)
    equal = (t == threshold.value) & (indices <= threshold.cutoff)
    return torch.nonzero((t < threshold.value) | equal).view(-1)


def exact(t: Tensor, k: int) -> Threshold:
    """The threshold that selects the `k` smallest of `t`, a whole tensor, 1-d."""
    valid = t.numel() - int(torch.isnan(t).sum())
    if k <= 0:
        return Threshold(-math.inf, -1)
    if k >= valid:
        return Threshold(math.inf, t.numel())
    return _settle(t, None, k, t.numel())


def bracket(sample: Tensor, k: int, numel: int) -> tuple[float, float]:
    """Two values between which the K-th smallest t most likely lies. `sample` is t at some positions."""
    n = sample.numel()
    share = k / numel
    margin = WIDTH * SPREAD * math.sqrt(n * share * (1 - share)) + 1
    sample = torch.where(torch.isnan(sample), math.inf, sample)
    low, high = math.floor(share * n - margin), math.ceil(share * n + margin)
    inner = tuple(rank for rank in (low, high) if 1 <= rank <= n)
    values = iter(smallest(sample, inner)) if inner else iter(())
    return next(values) if low >= 1 else -math.inf, next(values) if high <= n else math.inf


class Collector:
    """Counts, chunk by chunk, the t below the bracket, and collects those inside."""

    def __init__(self, k: int, numel: int, lower: float, upper: float) -> None:
        self.k, self.numel, self.lower, self.upper = k, numel, lower, upper
        self.below = 0
        self.values: list[Tensor] = []
        self.indices: list[Tensor] = []

    def add(self, t: Tensor, start: int) -> None:
        """Add one chunk, whose first element is element `start`."""
        out = buffer("collect", t.numel(), t.dtype)
        if self.lower > -math.inf:
            self.below += int(torch.lt(t, self.lower, out=out).sum())  # at most CHUNK: exact in float32
        # Operations whose result is bool are five times slower here than those on floats, so: float first.
        torch.clamp(t, self.lower, self.upper, out=out).eq_(t)  # NaN is not equal to itself
        inside = buffer("inside", t.numel(), torch.bool)
        inside.copy_(out)
        places = torch.nonzero(inside).view(-1)
        self.values.append(t.index_select(0, places))
        self.indices.append(places.add_(start))

    def settle(self) -> Threshold | None:
        """The threshold; None if the bracket has missed."""
        values = torch.cat(self.values)
        rank = self.k - self.below
        if not 1 <= rank <= values.numel():
            return None
        return _settle(values, torch.cat(self.indices), rank, self.numel)


def bracket_runs(numel: int) -> Tensor:
    """The numbers of the aligned runs of `RUN` neighbours that the bracket is made from: spread evenly, int64."""
    runs, available = SAMPLE // RUN, numel // RUN
    return torch.arange(runs, device="cpu") * (available - 1) // (runs - 1)


def top_k(score: Tensor, k: int) -> Tensor:
    """`selective.kernels.top_k` on the CPU."""
    t = score.detach().reshape(-1).to(torch.float64 if score.dtype == torch.float64 else torch.float32).neg()
    numel = t.numel()
    threshold: Threshold | None = None
    if numel > 4 * SAMPLE and 0 < k < numel:
        sample = t[: numel // RUN * RUN].view(-1, RUN).index_select(0, bracket_runs(numel)).view(-1)
        collector = Collector(k, numel, *bracket(sample, k, numel))
        for start, end in spans(numel):
            collector.add(t[start:end], start)
        threshold = collector.settle()
    if threshold is None:
        threshold = exact(t, k)
    return threshold.mark(t, 0, t).to(torch.bool).reshape(score.shape)
