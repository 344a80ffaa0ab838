"""The step of shards: the parts of it that need other ranks, and the order in which these are asked.

The rounds of tensors of one policy (`docs/guides/sharded.md` has the table):

- none, if neither the selection nor the strength looks at more than single coordinates;
- one, if sums are needed;
- for exact top-K four for the K-th score (eight in float64), and one to three for ties. Sums travel with the last of
  these, unless they are sums of the selected coordinates themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..reference.random import SAMPLE_SIZE
from ..reference.rules import advance, as_seen
from ..shard import Shard
from ..spec import SUM_NAMES, Item, ItemList, StepSpec, Sums, SumsTable, check_kinds
from . import ties
from . import top_k as ranking
from .buckets import Buckets, buckets_of, is_local
from .exact_sums import WIDTH, digits, number
from .exchange import Part, RunningPart
from .strengths import names_of_sums, needs_sums, sums_with_ties
from .tensor_step import ShardedTensorStep

LocalStep = Callable[[Sequence[Item], StepSpec], Sequence[Sums] | None]  # `selective_step` of whole tensors


class Kernels(Protocol):
    """The interface of `kernels.gpu.ShardKernels`."""

    @staticmethod
    def step(items: Sequence[Item], spec: StepSpec, cache: dict[Any, Any]) -> Part: ...
    @staticmethod
    def digits(table: Tensor) -> Tensor: ...
    @staticmethod
    def number(digits: Tensor, rows: int) -> Tensor: ...


def sharded_step(
    items: Sequence[Item],
    spec: StepSpec,
    *,
    local_step: LocalStep,
    kernels: Callable[[Item], type[Kernels] | None] = lambda item: None,
    buckets: Buckets | None = None,
) -> list[RunningPart]:
    """The parts of the step of these shards, not yet run: `exchange.run` runs them.

    Args:
        items: all of them shards (`Item.shard`).
        spec: holds for all items.
        local_step: the step of whole tensors, for shards that can be stepped as if they were whole.
        kernels: the Triton kernels that step shards of an item's dtype and device; None if there are none.
        buckets: those of these items, if they are known.

    Returns:
        One part for each bucket of items that go together. A part's sums come in the order of its `places`.

    Raises:
        ValueError: before anything has moved, for a selection that looks at whole tensors and has no code for shards.
    """
    check_kinds("the sharded step", spec)
    _refuse_whole(spec)
    steps, used = [], set()
    known = buckets_of(items, spec, kernels) if buckets is None else buckets
    for (_, _, _, here, step_kernels, *_), places in known.items():
        mine = items if len(places) == len(items) else [items[place] for place in places]
        theirs = cast("type[Kernels] | None", step_kernels)
        if here:
            part = _local(mine, spec, local_step, theirs)
        else:
            part = _whole(mine, spec) if theirs is None else theirs.step(mine, spec, _cache(items, places))
            used.add(("shards", *places))
        shard = mine[0].shard
        assert shard is not None
        steps.append(RunningPart(shard.group, mine[0].param.device, part, places))
    if isinstance(items, ItemList):  # forget the buckets of earlier steps: a schedule of the fraction makes others
        for key in [key for key in items.cache if key[0] == "shards" and key not in used]:
            del items.cache[key]
    return steps


def _refuse_whole(spec: StepSpec) -> None:
    if spec.selection.control is not None:
        raise ValueError(
            "the selection has a matched control, which looks at the whole of tensors, and these are sharded: advance "
            "the moments, select in torch and apply the mask instead"
        )
    if spec.selection.kind == "function" and not is_local(spec):
        raise ValueError(
            "the selection is a Triton function, and the strength or the rounding looks at the whole of tensors that "
            "are sharded: advance the moments, select in torch and apply the mask instead"
        )


def _cache(items: Sequence[Item], places: list[int]) -> dict[Any, Any]:
    """The dictionary that is kept from step to step for the items at these places."""
    return items.cache.setdefault(("shards", *places), {}) if isinstance(items, ItemList) else {}


def count_rounds(spec: StepSpec, shards: Sequence[Shard], dtype: torch.dtype) -> int:
    """The number of collectives that a step of these shards takes: all of one process group, and of this dtype."""
    if is_local(spec):
        return int(spec.statistics)
    selection = spec.selection
    ranked = [s for s in shards if selection.kind == "top_k" and selection.k_of(s.numel) > 0]
    if not ranked:
        return int(needs_sums(spec))
    exact = [s for s in ranked if selection.quantile == "exact" or s.numel <= SAMPLE_SIZE]
    together = sums_with_ties(spec)
    rounds = max(ties.tie_rounds(exact), int(together))
    return (8 if dtype == torch.float64 else 4) + rounds + int(needs_sums(spec) and not together)


def _summed(rows: Sequence[Tensor] | Tensor) -> Generator[Tensor, Tensor, Tensor]:
    """Ask for the sums over the ranks of these float64 rows: [rows, columns]."""
    table = rows if isinstance(rows, Tensor) else torch.stack(list(rows))
    answer = yield digits(table).reshape(-1)
    return number(answer.reshape(*table.shape, WIDTH))


def _local(items: Sequence[Item], spec: StepSpec, local_step: LocalStep, kernels: type[Kernels] | None) -> Part:
    """Step these by the kernels for whole tensors, and add up what those report."""
    shards = [item.shard for item in items]
    sums = local_step(items, spec)
    if sums is None:
        return None
    table = sums.values if isinstance(sums, SumsTable) else torch.stack([_row(one) for one in sums])
    own, strengths = torch.cat([table[:, :1], table[:, 3:]], 1), table[:, 1:3]
    rows = [row if s is not None and s.counted else torch.zeros_like(row) for row, s in zip(own, shards, strict=True)]
    mine = own if all(s is not None and s.counted for s in shards) else torch.stack(rows)
    if kernels is None:
        everybody = yield from _summed(mine)
    else:
        answer = yield kernels.digits(mine)
        everybody = kernels.number(answer, len(items))
    values = torch.cat([everybody[:, :1], strengths, everybody[:, 1:]], 1)
    return SumsTable(values, [0 if shard is None else shard.numel for shard in shards])


def _row(sums: Sums) -> Tensor:
    """`sums` as a row of a `SumsTable`."""
    return torch.stack([getattr(sums, name) for name in SUM_NAMES])


def _whole(items: Sequence[Item], spec: StepSpec) -> Part:
    """Step these in plain torch: first the updates of all tensors, then the rounds, then the parameters."""
    moved = [as_seen(spec.rule, advance(item, spec.rule, keep_previous=spec.keeps_previous)) for item in items]
    steps = [ShardedTensorStep(item, spec, one) for item, one in zip(items, moved, strict=True)]
    ranked = [step.selection.ranked for step in steps if step.selection.ranked is not None]
    names = names_of_sums(spec)
    table: Tensor | None = None
    if ranked:
        yield from ranking.find(ranked)
        for step in steps:
            step.selection.after_ranking(settled=False)
        extra = torch.zeros(0, dtype=torch.int32, device=ranked[0].key.device)
        if sums_with_ties(spec):
            extra = digits(torch.stack([step.sums() for step in steps])).reshape(-1)
        extra = yield from ties.settle(ranked, extra)
        for step in steps:
            step.selection.after_ranking(settled=True)
        if sums_with_ties(spec):
            table = number(extra.reshape(len(steps), len(names), WIDTH))
    if table is None and needs_sums(spec):
        table = yield from _summed([step.sums() for step in steps])
    reports = []
    for index, step in enumerate(steps):
        sums = None if table is None else dict(zip(names, table[index].unbind(), strict=True))
        reports.append(step.finish(sums))
    return [report for report in reports if report is not None] if spec.statistics else None
