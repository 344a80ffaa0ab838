"""Which of the scores that equal the K-th are taken: those at the lowest indices of the whole tensor.

The whole is cut into `cells` (`Shard.cells`), numbered in its order, each on one process. Every process counts its ties
by cell, the counts are added, and the cell is found in which the last one is taken: in one round where cells are few,
else cells are counted in lots, and the lot in which it is in smaller ones. That cell's process knows the order in it.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence

import torch
from torch import Tensor

from ..reference.shard_indices import cells
from ..spec import Shard
from .top_k import Ranked, counts_of

ONE_ROUND = 720
"""Cells of which the ties are found in one round: counters of less than 3 KiB, a tensor has less than 8 in all."""
TWO_ROUNDS = 2**22
"""... and in two. Their counters have less than 3 KiB for up to 129,600 cells, 8 for a million (a vocabulary of 128k by
columns over eight ranks), 16 at most: of tensors that large a model has one or two, and rounds are what costs."""


def tie_rounds(shards: Iterable[Shard]) -> int:
    """How many rounds the ties of these take."""
    most = max((shard.cells for shard in shards), default=0)
    return 0 if most == 0 else 1 if most <= ONE_ROUND else 2 if most <= TWO_ROUNDS else 3


def _lots(count: int) -> list[tuple[int, int]]:
    """For each round how many cells a counter stands for, and how many counters there are."""
    many = tie_rounds([Shard((count,), (), None, cut=0, pieces=count)])
    base = count if many == 1 else math.ceil(count ** (1 / many))
    while base**many < count:
        base += 1
    sizes = [base**power for power in reversed(range(many))]
    return [(size, math.ceil(count / size) if place == 0 else base) for place, size in enumerate(sizes)]


class _Search:
    """One tensor's. Where its process has one cell alone, as by rows, no element's cell has to be looked up."""

    def __init__(self, one: Ranked) -> None:
        assert one.need is not None
        self.one, self.shard, self.device = one, one.shard, one.key.device
        self.lots = _lots(self.shard.cells)
        self.start = torch.zeros((), dtype=torch.int64, device=self.device)  # the cells that are left begin here
        self.left = one.need  # how many ties are taken of them
        runs = self.shard.runs
        self.single = self.shard.places[0] if self.shard.cut == 0 and len(runs[0]) == 1 else None

    def counts(self, number: int) -> Tensor:
        """How many ties are in each lot of this round, here."""
        size, many = self.lots[number]
        equal = self.one.key == self.one.prefix
        if not self.shard.counted:
            return torch.zeros(many, dtype=torch.int32, device=self.device)
        if self.single is not None and size == 1 and len(self.lots) == 1:
            counts = torch.zeros(many, dtype=torch.int32, device=self.device)
            counts[self.single] = equal.sum()
            return counts
        lot = torch.div(cells(self.shard, self.device) - self.start, size, rounding_mode="floor")
        return counts_of(torch.where(equal, lot, -1), many)

    def mark(self) -> None:
        """Taken are all ties of the cells before, and the first `left` of this one."""
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
    """Go on in the lot in which each one's last tie is taken; all have equally many, of equally many cells."""
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
    """Say which ties are taken (`Ranked.taken`). `extra` (int32, 1-d) is summed along in the last round; returned.

    In as many rounds as the tensor with the most cells takes; those that are done before send nothing.
    """
    searches = [_Search(one) for one in tensors if one.ties]
    rounds = max([1 if extra.numel() else 0, *(len(search.lots) for search in searches)])
    for number in range(rounds):
        asking = [search for search in searches if number < len(search.lots)]
        also = [extra] if number == rounds - 1 else []
        mine = [search.counts(number) for search in asking]
        found = (yield torch.cat([*mine, *also])).split([x.numel() for x in (*mine, *also)])
        alike: dict[tuple[int, int], list[int]] = {}
        for place, search in enumerate(asking):
            alike.setdefault(search.lots[number], []).append(place)
        for (size, _), places in alike.items():
            _narrow([asking[place] for place in places], [found[place] for place in places], size)
        extra = found[-1] if also else extra
    for search in searches:
        search.mark()
    return extra
