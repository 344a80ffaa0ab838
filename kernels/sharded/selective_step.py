"""The step of shards: which parts of it need other processes, and in which order they are asked.

Rounds for tensors of one policy (`docs/sharded.md` has the table): none where neither the selection nor the strength
looks at more than single coordinates; one where sums are needed; for exact top-K four for the K-th score (eight in
float64) and one to three for ties, sums travelling with the last of them, but for those of the selected themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..reference.random import SAMPLE_SIZE
from ..reference.rules import advance, as_seen
from ..spec import SUM_NAMES, Draw, Item, ItemList, Rule, Selection, Shard, Strength, Sums, SumsTable, check_kinds
from . import ties
from . import top_k as ranking
from .exact_sums import WIDTH, digits, number
from .exchange import Part, Steps
from .gpu_path import can_be, kind_of, wanted
from .how import How
from .tensor_step import Work

LocalStep = Callable[..., Sequence[Sums] | None]  # `selective_step` of whole tensors


class Kernels(Protocol):
    """`kernels.gpu.ShardKernels`."""

    @staticmethod
    def step(items: Sequence[Item], how: How, cache: dict[Any, Any]) -> Part: ...
    @staticmethod
    def digits(table: Tensor) -> Tensor: ...
    @staticmethod
    def number(digits: Tensor, rows: int) -> Tensor: ...


def sharded_step(
    items: Sequence[Item],
    *,
    rule: Rule,
    selection: Selection,
    strength: Strength,
    draw: Draw,
    statistics: bool,
    local_step: LocalStep,
    kernels: Callable[[Item], type[Kernels] | None] = lambda item: None,
) -> list[Steps]:
    """What has to be run (`exchange.run`) to step these; each part's sums come in the order of its `places`.

    `kernels`: what steps shards of this dtype and device by Triton kernels, if there is anything.
    """
    check_kinds("the sharded step", rule, selection, strength)
    how = How(rule, selection, strength, draw, statistics)
    if selection.control is not None:
        raise ValueError(
            "the selection has a matched control, which looks at the whole of tensors, and these are sharded: advance "
            "the moments, select in torch and apply the mask instead"
        )
    if selection.kind == "function" and not is_local(how):
        raise ValueError(
            "the selection is a Triton function, and the strength or the rounding looks at the whole of tensors that "
            "are sharded: advance the moments, select in torch and apply the mask instead"
        )
    alike: dict[tuple[object, ...], list[int]] = {}
    for place, item in enumerate(items):
        assert item.shard is not None
        double = item.param.dtype == torch.float64 and selection.kind == "top_k"
        here = is_local(how) and not (selection.kind == "bernoulli" and item.shard.first(selection.unit) is None)
        # what ranks ask together must not go by how much of a tensor is here
        able = statistics and item.shard.numel < 1 << 31 if here else can_be(item, how)
        by_kernels = kernels(item) if able else None
        same = () if here or by_kernels is None else kind_of(item, how)
        alike.setdefault((id(item.shard.group), item.param.device, double, here, by_kernels, *same), []).append(place)
    found, used = [], set()
    for (_, _, _, here, by_kernels, *_), places in alike.items():
        mine = items if len(places) == len(items) else [items[place] for place in places]
        theirs = cast("type[Kernels] | None", by_kernels)
        if here:
            part = _local(mine, how, local_step, theirs)
        else:
            part = _whole(mine, how) if theirs is None else theirs.step(mine, how, _cache(items, places))
            used.add(("shards", *places))
        shard = mine[0].shard
        assert shard is not None
        found.append(Steps(shard.group, mine[0].param.device, part, places))
    if isinstance(items, ItemList):  # of tensors that went together once: a schedule of the fraction parts them
        for key in [key for key in items.cache if key[0] == "shards" and key not in used]:
            del items.cache[key]
    return found


def _cache(items: Sequence[Item], places: list[int]) -> dict[Any, Any]:
    """What is remembered from step to step of these of the items."""
    return items.cache.setdefault(("shards", *places), {}) if isinstance(items, ItemList) else {}


def is_local(how: How) -> bool:
    """Whether the kernels for whole tensors do the same on shards: nothing but single coordinates is looked at.

    They draw random numbers from a place in the whole tensor on, for masks; rounding does not have that place.
    """
    if how.selection.kind == "top_k" or how.by_previous or how.strength.kind != "fixed":
        return False
    return not how.draw.stochastic


def count_rounds(how: How, shards: Sequence[Shard], dtype: torch.dtype) -> int:
    """How many collectives a step of these tensors takes part in: all of one group of processes, of this dtype."""
    if is_local(how):
        return int(how.statistics)
    selection = how.selection
    ranked = [s for s in shards if selection.kind == "top_k" and wanted(selection, s.numel) > 0]
    if not ranked:
        return int(how.needs_sums)
    exact = [s for s in ranked if selection.quantile == "exact" or s.numel <= SAMPLE_SIZE]
    rides = how.needs_sums and not how.strength_waits
    rounds = max(ties.tie_rounds(exact), int(rides))
    return (8 if dtype == torch.float64 else 4) + rounds + int(how.needs_sums and not rides)


def _summed(rows: Sequence[Tensor] | Tensor) -> Generator[Tensor, Tensor, Tensor]:
    """Ask for the sums of these float64 rows: [rows, columns]."""
    table = rows if isinstance(rows, Tensor) else torch.stack(list(rows))
    answer = yield digits(table).reshape(-1)
    return number(answer.reshape(*table.shape, WIDTH))


def _local(items: Sequence[Item], how: How, local_step: LocalStep, kernels: type[Kernels] | None) -> Part:
    """The kernels for whole tensors, and the sums of what they report."""
    arguments: dict[str, Any] = {
        "rule": how.rule, "selection": how.selection, "strength": how.strength, "draw": how.draw,
    }  # fmt: skip
    shards = [item.shard for item in items]
    sums = local_step(items, **arguments, statistics=how.statistics)
    if sums is None:
        return None
    table = sums.values if isinstance(sums, SumsTable) else torch.stack([_row(one) for one in sums])
    own, strengths = torch.cat([table[:, :1], table[:, 3:]], 1), table[:, 1:3]
    rows = [row if s is not None and s.counted else torch.zeros_like(row) for row, s in zip(own, shards, strict=True)]
    mine = own if all(s is not None and s.counted for s in shards) else torch.stack(rows)
    if kernels is None:
        found = yield from _summed(mine)
    else:
        answer = yield kernels.digits(mine)
        found = kernels.number(answer, len(items))
    values = torch.cat([found[:, :1], strengths, found[:, 1:]], 1)
    return SumsTable(values, [0 if shard is None else shard.numel for shard in shards])


def _row(sums: Sums) -> Tensor:
    """As a row of a `SumsTable`."""
    return torch.stack([getattr(sums, name) for name in SUM_NAMES])


def _whole(items: Sequence[Item], how: How) -> Part:
    """Everything else, by itself: all tensors' updates first, then the rounds, then the parameters."""
    moved = [as_seen(how.rule, advance(item, how.rule, keep_previous=how.by_previous)) for item in items]
    works = [Work(item, how, one) for item, one in zip(items, moved, strict=True)]
    ranked = [work.ranked for work in works if work.ranked is not None]
    found: Tensor | None = None
    if ranked:
        yield from ranking.find(ranked)
        rides = how.needs_sums and not how.strength_waits
        extra = torch.zeros(0, dtype=torch.int32, device=ranked[0].key.device)
        for work in works:
            work.after_ranking(settled=False)
        if rides:
            table = torch.stack([work.sums() for work in works])
            extra = digits(table).reshape(-1)
        extra = yield from ties.settle(ranked, extra)
        for work in works:
            work.after_ranking(settled=True)
        if rides:
            found = number(extra.reshape(len(works), len(how.columns), WIDTH))
    if found is None and how.needs_sums:
        found = yield from _summed([work.sums() for work in works])
    result = []
    for index, work in enumerate(works):
        row: dict[str, Tensor] | None = None
        if found is not None:
            row = dict(zip(how.columns, found[index].unbind(), strict=True))
        result.append(work.finish(row))
    return [one for one in result if one is not None] if how.statistics else None
