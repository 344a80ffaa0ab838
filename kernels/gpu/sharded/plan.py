"""The plan of shards that are stepped together, kept from step to step: their batch, and how they are cut up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ...lasting import lasting
from ...sharded.strengths import names_of_sums
from ...spec import Item, StepSpec
from ..batch import Batch
from ..configure import configure, static_key
from ..device import config
from ..plan import prepared
from ..tables import cdiv, upload, work
from . import sums as shard_sums

SPAN = 8192  # elements of a program


class ShardPlan:
    """The shards of one call as one batch, and how they are cut up."""

    def __init__(self, items: Sequence[Item], spec: StepSpec, begins: bool) -> None:
        self.key = static_key(spec)
        cfg = configure(items[0], replace(spec, statistics=False), begins)  # statistics are in the sums of the ranks
        self.batch = Batch(cfg, items, list(range(len(items))), [spec])
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
        columns = [shard_sums.NAMES.index(name) for name in names_of_sums(spec)]
        self.columns = upload(columns, torch.int64, self.device)

    def fits(self, items: Sequence[Item], spec: StepSpec) -> bool:
        """True if the plan is right for these items. Gradients may be elsewhere, and numbers may have changed."""
        shards = [item.shard.numel for item in items if item.shard is not None]
        return static_key(spec) == self.key and shards == self.numels and self.batch.fits(items)

    def update(self, items: Sequence[Item], spec: StepSpec) -> None:
        """Bring the tables up to date."""
        tables, selection = self.batch.tables, spec.selection
        self.batch.groups.update([spec])
        self.batch.update(items, [spec])
        if selection.kind == "top_k" and self.fraction != selection.fraction:  # ranks are those of the whole
            rows = [[0] * config.RANKS.value for _ in self.numels]
            for row, numel in zip(rows, self.numels, strict=True):
                row[config.WANTED.value] = selection.k_of(numel)
                row[config.MODE.value] = config.EXACT.value
            tables.uploads.fill("ranks", tables.ranks, rows)
            self.fraction = selection.fraction


def planned(items: Sequence[Item], spec: StepSpec, cache: dict[Any, Any]) -> tuple[ShardPlan, list[Item], list[Any]]:
    """A new plan, the items with contiguous tensors, and the (tensor, copy) pairs to write back after the step."""
    arranged, back, begins = prepared(items, spec)
    with lasting():
        plan = ShardPlan(arranged, spec, begins[0])
    cache.pop("plan", None)
    if not back and not any(begins):
        cache["plan"] = plan
    return plan, arranged, back
