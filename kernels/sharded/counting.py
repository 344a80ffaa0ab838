"""The K-th largest score of each of many tensors at once, and which of those that equal it are taken.

What `ranking.py` and `ties.py` do for one tensor after the other: the same bits are sent, the same are selected.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..spec import Shard
from .ranking import BINS, largest_first
from .slices import Slice, upload

LANES = 32
"""Copies of the counters on a GPU, one for each thread of a warp: most scores of a tensor begin with the same few bits,
and threads that add to one counter wait for each other."""


@dataclass
class Found:
    """Of each tensor: the K-th key, how many of those that equal it are taken, and how many there are."""

    prefix: Tensor  # int32 [tensors]
    need: Tensor  # int64
    among: Tensor  # int64

    def above(self, some: Slice) -> Tensor:
        """Which of a slice's elements are above the K-th, and so are selected whatever becomes of the ties."""
        assert some.key is not None
        return (some.key > self.prefix[some.seg]) & (self.need > 0)[some.seg]

    def equal(self, some: Slice) -> Tensor:
        """Which equal the K-th."""
        assert some.key is not None
        return some.key == self.prefix[some.seg]


def histograms(digit: Tensor, seg: Tensor, count: int) -> Tensor:
    """How many of each integer in [0, 256) each tensor has: int32 [tensors, 256]; others don't count."""
    if digit.device.type != "cpu":
        return in_lanes(digit, seg, count)
    inside = (digit >= 0) & (digit < BINS)
    place = (seg * BINS + digit)[inside]  # of unknown length, which a GPU would be waited for
    return torch.bincount(place, minlength=count * BINS).to(torch.int32).view(count, BINS)


def in_lanes(digit: Tensor, seg: Tensor, count: int) -> Tensor:
    """`histograms`, by adding to counters in memory."""
    size = count * BINS  # and one more for the rest, in each lane
    lane = torch.arange(digit.numel(), device=digit.device) % LANES
    inside = (digit >= 0) & (digit < BINS)
    place = lane * (size + 1) + torch.where(inside, seg * BINS + digit, size)
    table = torch.zeros(LANES * (size + 1), dtype=torch.int32, device=digit.device)
    table.scatter_add_(0, place, torch.ones((), dtype=torch.int32, device=digit.device).expand_as(place))
    return table.view(LANES, size + 1)[:, :size].sum(0, dtype=torch.int32).view(count, BINS)


def find(slices: Sequence[Slice], wanted: Sequence[int], counted: Tensor) -> Generator[Tensor, Tensor, Found]:
    """Four rounds, eight bits of the key in each, from the highest; NaN, the smallest key, is left out of the first."""
    device, tensors = counted.device, len(wanted)
    nothing = torch.iinfo(torch.int32).min
    base = need = chosen = torch.zeros(tensors, dtype=torch.int64, device=device)
    prefix = torch.zeros(tensors, dtype=torch.int32, device=device)
    counts = torch.zeros(tensors, BINS, dtype=torch.int64, device=device)
    for shift in (24, 16, 8, 0):
        here = torch.zeros(tensors, BINS, dtype=torch.int32, device=device)
        base = prefix << 8
        for some in slices:
            assert some.key is not None
            high = some.key >> shift
            digit = torch.where(some.key == nothing, -1, high + 128) if shift == 24 else high - base[some.seg]
            here += histograms(digit, some.seg, tensors)
        here = torch.where(counted[:, None] > 0, here, 0)
        counts = (yield here.reshape(-1)).reshape(-1, BINS).to(torch.int64)
        if shift == 24:
            need = torch.minimum(upload(wanted, device), counts.sum(1))
        chosen, need = largest_first(counts, need)
        prefix = (chosen - 128 if shift == 24 else base + chosen).to(torch.int32)
    return Found(prefix, need, counts.gather(1, chosen[:, None])[:, 0])


def settle(
    slices: Sequence[Slice], found: Found, shards: Sequence[Shard], counted: Tensor, extra: Tensor
) -> Generator[Tensor, Tensor, Tensor]:
    """Say which are selected (`chosen`). One round: each rank has one cell of each tensor, or none (see `ties.py`).

    `extra` (int32, 1-d) is summed along; returned.
    """
    device, cells = counted.device, max(shard.cells for shard in shards)
    place = upload([shard.places[0] if all(shard.runs) and shard.places else 0 for shard in shards], device)[:, None]
    starting, mine = [], []
    for some in slices:
        upto = found.equal(some).cumsum(0)
        padded = torch.cat([upto.new_zeros(1), upto])
        begins = padded[some.starts]
        mine.append(padded[some.starts + some.sizes] - begins)
        starting.append(begins)
    own = torch.cat(mine)
    table = torch.zeros(len(shards), cells, dtype=torch.int64, device=device).scatter_(1, place, own[:, None])
    table = torch.where(counted[:, None] > 0, table, 0).to(torch.int32)
    answer = yield torch.cat([table.reshape(-1), extra])
    table, extra = answer[: table.numel()].view_as(table).to(torch.int64), answer[table.numel() :]
    before = (table.cumsum(1) - table).gather(1, place)[:, 0]
    left = found.need - before
    for some, begins in zip(slices, starting, strict=True):
        equal = found.equal(some)
        number = equal.cumsum(0) - begins[some.seg - some.first]
        some.chosen = found.above(some) | (equal & (number <= left[some.seg]))
    return extra
