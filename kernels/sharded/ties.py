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

from ..reference.places import cells
from ..spec import Shard
from .ranking import Ranked, counts_of

ONE_ROUND = 720  # cells of which the ties are found in one round ...
TWO_ROUNDS = 360**2  # ... and in two: counters of less than 3 KiB, so that with all others a tensor has less than 8


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

    def places(self) -> Tensor:
        """The cell of every local element: 1-d, or 0-d where all are in one."""
        if self.single is None:
            return cells(self.shard, self.device)
        return torch.full((), self.single, dtype=torch.int64, device=self.device)

    def counts(self, number: int) -> Tensor:
        """How many ties are in each lot of this round, here."""
        size, many = self.lots[number]
        lot = torch.div(self.places() - self.start, size, rounding_mode="floor")
        inside = (self.one.key == self.one.prefix) & (lot >= 0) & (lot < many)
        counts = counts_of(torch.where(inside, lot, many), many)
        return counts if self.shard.counted else torch.zeros_like(counts)

    def narrow(self, number: int, counts: Tensor) -> None:
        """Go on in the lot in which the last tie is taken."""
        upto = counts.to(torch.int64).cumsum(0)
        before = upto - counts
        inside = (before < self.left) & (self.left <= upto)
        place = torch.arange(counts.numel(), device=self.device)
        self.start = self.start + (inside * place).sum() * self.lots[number][0]
        self.left = self.left - (inside * before).sum()

    def mark(self) -> None:
        """Taken are all ties of the cells before, and the first `left` of this one."""
        equal, places = self.one.key == self.one.prefix, self.places()
        here = equal & (places == self.start)
        self.one.taken = (equal & (places < self.start)) | (here & (here.cumsum(0) <= self.left))


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
        for search, counts in zip(asking, found, strict=False):
            search.narrow(number, counts)
        extra = found[-1] if also else extra
    for search in searches:
        search.mark()
    return extra
