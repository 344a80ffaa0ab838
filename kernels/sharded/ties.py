"""Ties of a top-K over shards: those at the lowest indices of the whole tensor are selected.

The whole is cut into `cells` (`Shard.cells`), numbered in its order, each on one process. Every process counts its ties
by cell, and the counts are added. So the cell of the last tie that is selected is found; its process knows the order in
it. One round is enough if there are few cells. Otherwise the first round counts buckets of neighbouring cells, and the
next counts the cells, or smaller buckets, of the bucket that has the last tie. Rows over n processes are n cells, and
columns rows × n.

Six rounds of 8 KiB a tensor tell some 50 bits apart: the 32 of a float32 score, and 18 of its place among equals. They
can't also hold a sum over what is selected, nor the 64 bits of a float64 score.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence

import torch
from torch import Tensor

from ..reference.shard_indices import cells
from ..shard import Shard
from .top_k import Ranked, counts_of

ONE_ROUND = 720
"""Up to so many cells, ties take one round: its counters have less than 3 KiB, a tensor's less than 8 KiB in all."""
TWO_ROUNDS = 2**22
"""Up to so many cells, ties take two rounds. Their counters have less than 3 KiB for up to 129,600 cells, 8 KiB for a
million (a vocabulary of 128k by columns over eight ranks), and 16 KiB at most. A model has one or two tensors that
large, and rounds cost more than bytes."""


def tie_rounds(shards: Iterable[Shard]) -> int:
    """The number of rounds that the ties of these shards take."""
    most = max((shard.cells for shard in shards), default=0)
    return 0 if most == 0 else 1 if most <= ONE_ROUND else 2 if most <= TWO_ROUNDS else 3


def _bucket_sizes(count: int) -> list[tuple[int, int]]:
    """For each round, the number of cells in a bucket and the number of buckets."""
    many = tie_rounds([Shard((count,), (), None, cut=0, pieces=count)])
    base = count if many == 1 else math.ceil(count ** (1 / many))
    while base**many < count:
        base += 1
    sizes = [base**power for power in reversed(range(many))]
    return [(size, math.ceil(count / size) if place == 0 else base) for place, size in enumerate(sizes)]


class _Search:
    """The search for one tensor's last tie. If its process has one cell alone, as with rows, no cells are looked up."""

    def __init__(self, one: Ranked) -> None:
        assert one.need is not None
        self.one, self.shard, self.device = one, one.shard, one.key.device
        self.rounds = _bucket_sizes(self.shard.cells)
        self.start = torch.zeros((), dtype=torch.int64, device=self.device)  # the first cell that may have the last tie
        self.left = one.need  # the number of ties that are selected from there on
        runs = self.shard.runs
        self.single = self.shard.places[0] if self.shard.cut == 0 and len(runs[0]) == 1 else None

    def counts(self, number: int) -> Tensor:
        """The number of local ties in each bucket of round `number`: int32, 1-d."""
        size, many = self.rounds[number]
        equal = self.one.key == self.one.prefix
        if not self.shard.counted:
            return torch.zeros(many, dtype=torch.int32, device=self.device)
        if self.single is not None and size == 1 and len(self.rounds) == 1:
            counts = torch.zeros(many, dtype=torch.int32, device=self.device)
            counts[self.single] = equal.sum()
            return counts
        bucket = torch.div(cells(self.shard, self.device) - self.start, size, rounding_mode="floor")
        return counts_of(torch.where(equal, bucket, -1), many)

    def mark(self) -> None:
        """Set `Ranked.taken`: all ties of the cells before `start`, and the first `left` of that cell."""
        equal = self.one.key == self.one.prefix
        if self.single is not None:
            everything = torch.where(self.start > self.single, equal.numel(), 0)
            limit = torch.where(self.start == self.single, self.left, everything)
            self.one.taken = equal & (equal.cumsum(0) <= limit)
            return
        places = cells(self.shard, self.device)
        here = equal & (places == self.start)
        self.one.taken = (equal & (places < self.start)) | (here & (here.cumsum(0) <= self.left))


def _narrow(searches: Sequence[_Search], counts: Sequence[Tensor], size: int) -> None:
    """Go on in the bucket that has each one's last tie. All have equally many buckets, of `size` cells each."""
    table = torch.stack(list(counts)).to(torch.int64)
    left = torch.stack([search.left for search in searches])[:, None]
    upto = table.cumsum(1)
    before = upto - table
    inside = (before < left) & (left <= upto)
    place = torch.arange(table.shape[1], device=table.device) * size
    moved, taken = (inside * place).sum(1), (inside * before).sum(1)
    start = torch.stack([search.start for search in searches]) + moved
    for search, begins, rest in zip(searches, start, left[:, 0] - taken, strict=True):
        search.start, search.left = begins, rest


def settle(tensors: Sequence[Ranked], extra: Tensor) -> Generator[Tensor, Tensor, Tensor]:
    """Find the ties that are selected (`Ranked.taken`), in as many rounds as the tensor with the most cells takes.

    `extra` (int32, 1-d) is summed along in the last round; its sum is returned. Tensors that are done before the last
    round send nothing in it.
    """
    searches = [_Search(one) for one in tensors if one.ties]
    rounds = max([1 if extra.numel() else 0, *(len(search.rounds) for search in searches)])
    for number in range(rounds):
        asking = [search for search in searches if number < len(search.rounds)]
        also = [extra] if number == rounds - 1 else []
        mine = [search.counts(number) for search in asking]
        summed = (yield torch.cat([*mine, *also])).split([x.numel() for x in (*mine, *also)])
        by_size: dict[tuple[int, int], list[int]] = {}
        for place, search in enumerate(asking):
            by_size.setdefault(search.rounds[number], []).append(place)
        for (size, _), places in by_size.items():
            _narrow([asking[place] for place in places], [summed[place] for place in places], size)
        extra = summed[-1] if also else extra
    for search in searches:
        search.mark()
    return extra
