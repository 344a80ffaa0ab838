"""Plan: the batches of several calls, whose tensors go into one launch wherever the same code steps them.

A call is a list of items (those of a parameter group) with its `StepSpec`. The tensors of several calls share a batch
if everything that is compiled in is the same; their numbers are read from a table that has a row for each call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from ..spec import Item, Selection, StepCall, Strength, SumsTable
from . import launch
from .batch import Batch
from .configure import configure, has_key, static_key
from .cuda_graphs import CudaRecorder
from .graphs import Recorder, RepeatedLaunches
from .graphs import Sums as BatchSums
from .groups import GroupTable
from .launch import Step, on
from .tables import is_in_place, state_columns, upload

RecorderOf = Callable[[torch.device], Recorder | None]


def cuda_recorder(device: torch.device) -> Recorder | None:
    """The recorder of launches on this device; None on a CPU."""
    return CudaRecorder(launch.DIRECT) if device.type == "cuda" else None


class Plan:
    """The batches of some calls, which are stepped together in every step as long as the plan fits them."""

    def __init__(
        self, calls: Sequence[StepCall], begins: Sequence[bool], recorder_of: RecorderOf = cuda_recorder
    ) -> None:
        """`begins`: for each item, True if SGD's momentum begins with this gradient."""
        self.keys, self.specs = [static_key(call.spec) for call in calls], [call.spec for call in calls]
        self.counts = [len(call.items) for call in calls]
        items = _all_items(calls)
        group_of = [group for group, count in enumerate(self.counts) for _ in range(count)]
        buckets: dict[tuple[object, ...], list[int]] = {}
        for index, item in enumerate(items):
            rule = self.specs[group_of[index]].rule
            on_host = rule.counts_steps and item.state["step"].device.type == "cpu"
            dtypes = tuple(None if c is None else c.dtype for c in state_columns(item, rule))
            key = (
                self.keys[group_of[index]], item.param.dtype, item.grad.dtype, dtypes, item.param.device, on_host,
                begins[index], is_in_place(item, rule),
            )  # fmt: skip
            buckets.setdefault(key, []).append(index)
        on_device: dict[torch.device, set[int]] = {}
        for item, group in zip(items, group_of, strict=True):
            on_device.setdefault(item.param.device, set()).add(group)
        self.groups = {device: GroupTable(len(calls), device, here) for device, here in on_device.items()}
        self.batches = []
        for members in buckets.values():
            cfg = configure(items[members[0]], self.specs[group_of[members[0]]], begins[members[0]])
            groups = self.groups[items[members[0]].param.device]
            self.batches.append(Batch(cfg, items, members, self.specs, group_of, groups))
        self.here = {device: [b for b in self.batches if b.device == device] for device in self.groups}
        self.launches = {
            device: RepeatedLaunches(partial(_step, batches), device, recorder_of(device))
            for device, batches in self.here.items()
        }
        self.numels = [item.param.numel() for item in items]
        reporting = [b for device in self.groups for b in self.batches if b.device == device and b.cfg.statistics]
        row_of = {index: row for row, index in enumerate(index for batch in reporting for index in batch.members)}
        self._rows = [row_of.get(index, -1) for index in range(len(items))]  # of each item in the batches' sums

    def fits(self, calls: Sequence[StepCall]) -> bool:
        """True if the batches are still right. Gradients may be elsewhere, and numbers may have changed."""
        if [len(call.items) for call in calls] != self.counts:
            return False
        if not all(map(has_key, [call.spec for call in calls], self.keys, self.specs)):
            return False
        items, looked = _all_items(calls), False not in [call.looked for call in calls]
        return all(batch.fits(items, looked) for batch in self.batches)

    def run(self, calls: Sequence[StepCall]) -> list[SumsTable | None]:
        """Step all batches. Returns the sums of each call."""
        self.specs, items = [call.spec for call in calls], _all_items(calls)
        graphs = all(call.graphs for call in calls)
        sums: BatchSums = []
        for device, batches in self.here.items():
            with on(device):
                self.groups[device].update(self.specs)
                for batch in batches:
                    batch.update(items, self.specs)
                sums += self.launches[device](wanted=graphs)
                for batch in batches:
                    batch.stepped(items)
        return self._reports([s for s in sums if s is not None])

    def describe_launches(self) -> list[str]:
        """The way in which the launches are made, in words: one by one, or as a CUDA graph. Nothing on a CPU."""
        texts = [launches.describe() for launches in self.launches.values()]
        return [text for text in dict.fromkeys(texts) if text is not None]

    def _reports(self, sums: list[Tensor]) -> list[SumsTable | None]:
        """The sums of each call, from those of the batches; None for a call without statistics."""
        if not sums:
            return [None] * len(self.specs)
        reports: list[SumsTable | None] = []
        start = 0
        for spec, count in zip(self.specs, self.counts, strict=True):
            rows, start = self._rows[start : start + count], start + count
            numels = self.numels[start - count : start]
            reports.append(SumsTable(partial(_in_order, sums, rows), numels) if spec.statistics else None)
        return reports

    def upload_hyperparameters(self, group: int, selection: Selection, strength: Strength) -> None:
        """Upload changed hyper-parameters of one call now, for the replays of a CUDA graph.

        Another kind of selection or strength would be another graph: then the recorded one goes on as it is.
        """
        spec = replace(self.specs[group], selection=selection, strength=strength)
        if static_key(spec) != self.keys[group]:
            return
        self.specs[group] = spec
        for device, groups in self.groups.items():
            with on(device):
                groups.upload_numbers(self.specs)
        for batch in self.batches:
            with on(batch.device):
                batch.upload_ranks(self.specs)


def _step(batches: Sequence[Batch]) -> tuple[BatchSums, int]:
    """Launch the step of each batch. Returns the sums of each, and the bytes of memory that the largest one took."""
    sums: BatchSums = []
    nbytes = 0
    for batch in batches:
        step = Step(batch)
        sums.append(step())
        nbytes = max(nbytes, step.nbytes)
    return sums, nbytes


def _all_items(calls: Sequence[StepCall]) -> Sequence[Item]:
    return calls[0].items if len(calls) == 1 else list(chain(*[call.items for call in calls]))


def _in_order(sums: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """These rows of the batches' tables of sums, on the first batch's device."""
    device = sums[0].device
    joined = sums[0] if len(sums) == 1 else torch.cat([s.to(device) for s in sums])
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return joined[rows[0] : rows[0] + len(rows)]
    return joined[upload(rows, torch.int64, device)]
