"""Sums and quantiles over all shards of a tensor for a policy's own code, and the report of its mask."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.strengths import total
from ..shard import Shard
from ..spec import Sums
from .exact_sums import WIDTH, digits, number
from .exchange import Part
from .top_k import Ranked, find, key_of


def run_alone(part: Generator[Tensor, Tensor, Any], group: Any) -> Any:
    """Run one part to its end by itself, with a collective for each of its rounds. Returns its result."""
    answer: Tensor | None = None
    while True:
        try:
            addends = next(part) if answer is None else part.send(answer)
        except StopIteration as end:
            return end.value
        answer = addends.clone()
        torch.distributed.all_reduce(answer, group=group)


def sum_over_shards(values: Sequence[Tensor], shard: Shard) -> Generator[Tensor, Tensor, Tensor]:
    """The sums over all shards of these 0-d numbers: float64, 1-d."""
    row = torch.stack([value.to(torch.float64) for value in values])
    answer = yield digits(row if shard.counted else torch.zeros_like(row)).reshape(-1)
    return number(answer.reshape(len(values), WIDTH))


def value_of(key: Tensor) -> Tensor:
    """The score whose key this is: the inverse of `key_of`."""
    bits = torch.where(key < 0, key ^ torch.iinfo(key.dtype).max, key)
    return bits.view(torch.float64 if key.dtype == torch.int64 else torch.float32)


def kth_smallest(x: Tensor, rank: int, shard: Shard) -> Generator[Tensor, Tensor, Tensor]:
    """The value of the whole tensor at place `rank`, from 0, in ascending order. NaN is larger than everything."""
    key = key_of(x)
    key = torch.where(torch.isnan(x.reshape(-1)), torch.iinfo(key.dtype).max, key)
    ranked = Ranked(key, shard.numel - rank, shard, ties=False)
    yield from find([ranked])
    assert ranked.prefix is not None
    return torch.where(ranked.prefix == torch.iinfo(key.dtype).max, torch.nan, value_of(ranked.prefix))


def mask_report(mask: Tensor, update: Tensor, grad: Tensor | None, shard: Shard) -> Part:
    """The report of a policy's own mask, from all shards: `selective.statistics.sums_of_mask` of the whole tensor."""
    multiplier = mask.to(update.dtype).expand(update.shape)
    largest = yield from kth_smallest(multiplier, shard.numel - 1, shard)
    masked = multiplier * update
    wanted = [
        total(multiplier == largest), total(multiplier), total(multiplier != 0), total(update * update),
        total(masked * masked),
    ]  # fmt: skip
    wanted += [] if grad is None else [total(grad * grad), total(update * grad)]
    sums = yield from sum_over_shards(wanted, shard)
    count, summed, moving, update_sq, masked_sq = sums[:5].unbind()
    nothing = torch.full_like(count, torch.nan)
    grad_sq, update_grad = (nothing, nothing) if grad is None else sums[5:].unbind()
    double, numel = largest.to(torch.float64), shard.numel
    count = torch.where(moving > 0, count, 0.0)
    rest = (summed - double * count) / (numel - count).clamp(min=1)
    rest = torch.where(count < numel, rest, double)
    return [Sums(numel, count, double, rest, update_sq, grad_sq, update_grad, masked_sq)]
