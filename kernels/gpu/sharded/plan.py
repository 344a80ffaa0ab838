"""What is kept of shards that are stepped together from step to step: their batch, and how they are cut up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...lasting import lasting
from ...sharded.how import How
from ...spec import Item
from ..batch import Batch
from ..configure import configure, static_key
from ..device import config
from ..plan import prepared
from ..tables import cdiv, upload, work
from . import sums as shard_sums

SPAN = 8192  # elements of a program


class ShardPlan:
    """What is kept of the shards of one call from step to step: their batch, and how they are cut up."""

    def __init__(self, items: Sequence[Item], how: How, begins: bool) -> None:
        described = how.rule, how.selection, how.strength, how.draw
        self.key = static_key(*described, how.statistics)
        self.batch = Batch(configure(items[0], *described, False, begins), items, list(range(len(items))), how.rule,
                           how.selection, how.strength)  # fmt: skip
        self.device, self.fraction = self.batch.device, -1.0
        shards = [item.shard for item in items if item.shard is not None]
        self.numels, self.cells = [shard.numel for shard in shards], max(shard.cells for shard in shards)
        self.span = SPAN
        counts = [cdiv(n, SPAN) for n in self.batch.numels]
        self.work, first = work(counts, self.device)
        self.programs = self.work.shape[0]
        cell = [shard.places[0] if all(shard.runs) and shard.places else 0 for shard in shards]
        rows = zip(first, counts, cell, (int(shard.counted) for shard in shards), strict=True)
        self.spans = upload([list(row) for row in rows], torch.int64, self.device)
        self.counted = all(shard.counted for shard in shards)
        self.lengths = upload(self.numels, torch.int64, self.device)
        columns = [shard_sums.NAMES.index(name) for name in how.columns]
        self.columns = upload(columns, torch.int64, self.device)

    def fits(self, items: Sequence[Item], how: How) -> bool:
        """Whether it is right for these items too: gradients may be elsewhere, and numbers changed."""
        now = static_key(how.rule, how.selection, how.strength, how.draw, how.statistics)
        shards = [item.shard.numel for item in items if item.shard is not None]
        return now == self.key and shards == self.numels and self.batch.fits(items)

    def update(self, items: Sequence[Item], how: How) -> Tensor | None:
        """Bring the tables up to date; where the clock is, if not in them."""
        clock, tables = how.draw.clock, self.batch.tables
        clock = None if clock is None or clock.device != self.device else clock
        self.batch.update(items, how.rule, how.selection, how.strength, how.draw, own_clock=clock is None)
        if how.selection.kind == "top_k" and self.fraction != how.selection.fraction:  # ranks are those of the whole
            rows = [[0] * config.RANKS.value for _ in self.numels]
            for row, numel in zip(rows, self.numels, strict=True):
                row[config.WANTED.value] = int(how.selection.fraction * numel)
                row[config.MODE.value] = config.EXACT.value
            tables.say("ranks", tables.ranks, rows)
            self.fraction = how.selection.fraction
        return clock


def planned(items: Sequence[Item], how: How, cache: dict[Any, Any]) -> tuple[ShardPlan, list[Item], list[Any]]:
    """A new plan, the items with contiguous tensors, and what has to be written back after the step."""
    arranged, back, begins = prepared(items, how.rule, how.selection, how.strength, how.draw)
    with lasting():
        plan = ShardPlan(arranged, how, begins[0])
    cache.pop("plan", None)
    if not back and not any(begins):
        cache["plan"] = plan
    return plan, arranged, back
