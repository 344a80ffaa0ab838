"""Collectives between ranks that share tensors: flags that all agree on, sums, and results of single ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from selective.kernels import spec
from selective.sharding.dtensor import shard_of


def seen_by_all(flags: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[bool]:
    """Return for each tensor if its flag is True on any rank, and one more flag for tensors on other ranks only.

    `flags` are 0-d bool, one for this rank's part of each of `tensors`. There is one all-reduce for each mesh. Smaller
    meshes come first, and their results take part in the next. So if meshes are nested, as those of a model are, all
    ranks of the largest learn everything. Waits for the device.
    """
    if not flags:
        return []
    shards = [shard_of(tensor) for tensor in tensors]
    own_flags = torch.stack([flag.to(flags[0].device) for flag in flags]).to(torch.int32)
    seen = torch.cat([own_flags, own_flags.new_zeros(1)])
    for group, places in _by_group(shards):
        here = torch.tensor([*places, len(flags)], dtype=torch.int64, device=own_flags.device)
        seen[-1] = seen.max()
        of_group = seen[here]
        torch.distributed.all_reduce(of_group, op=torch.distributed.ReduceOp.MAX, group=group)
        seen[here] = of_group
    return [bool(value) for value in seen.tolist()]


def _by_group(shards: Sequence[Any]) -> list[tuple[Any, list[int]]]:
    """Return the process groups, small ones first, each with the places of its tensors."""
    by_group: dict[int, tuple[Any, list[int]]] = {}
    for place, shard in enumerate(shards):
        if shard is not None:
            by_group.setdefault(id(shard.group), (shard.group, []))[1].append(place)
    return sorted(by_group.values(), key=lambda pair: torch.distributed.get_world_size(pair[0]))


# Elements that are sent at once, 256 MiB. A refresh needs this much memory for each of its two collectives.
SENT = 2**26


def counts_in_sums(shard: spec.Shard | None) -> bool:
    """True if this rank's part counts in sums over ranks; False on further replicas, which add zeros."""
    return shard is None or shard.counted


def all_reduced(vectors: Sequence[Tensor], counted: Sequence[bool], group: Any) -> list[Tensor]:
    """Return the sum over ranks of each of these 1-d tensors, by one all-reduce. Those not `counted` add zeros."""
    buffer = torch.cat([v if counts else torch.zeros_like(v) for v, counts in zip(vectors, counted, strict=True)])
    torch.distributed.all_reduce(buffer, group=group)
    return list(buffer.split([v.numel() for v in vectors]))


def from_owners(rows: Sequence[Tensor], group: Any) -> list[Tensor]:
    """Return each row as its owner has it, by one all-reduce; on all other ranks the row has to be zeros."""
    return all_reduced(rows, [True] * len(rows), group)


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """Return the rank that solves each matrix of these sizes; the same on all ranks.

    The largest matrices are assigned first, each to the rank with the least work (n³) so far.
    """
    load, owner = [0] * ranks, [0] * len(sizes)
    for k in sorted(range(len(sizes)), key=lambda k: -sizes[k]):
        owner[k] = load.index(min(load))
        load[owner[k]] += sizes[k] ** 3
    return owner


def bits_of(value: Tensor, device: torch.device) -> Tensor:
    """Return the bits of a float32 or int64 tensor as 1-d int32, on `device`."""
    return value.to(device).reshape(-1).contiguous().view(torch.int32)


def write_bits(row: Tensor, values: Iterable[Tensor]) -> int:
    """Write the bits at the beginning of `row` into these tensors in place, and return the number of elements read."""
    start = 0
    for value in values:
        end = start + value.numel() * value.element_size() // 4
        value.copy_(row[start:end].clone().view(value.dtype).reshape(value.shape))
        start = end
    return start


def sums_over_ranks(parts: Sequence[Tensor], shards: Sequence[spec.Shard | None]) -> list[Tensor]:
    """Return the sum over ranks of each part, by an all-reduce for each group, device, dtype and `SENT` elements."""
    by_kind: dict[tuple[object, ...], list[int]] = {}
    for index, (part, shard) in enumerate(zip(parts, shards, strict=True)):
        assert shard is not None
        by_kind.setdefault((id(shard.group), part.device, part.dtype), []).append(index)
    totals: list[Tensor] = list(parts)
    for indices in by_kind.values():
        bucket: list[int] = []
        for index in indices:
            if bucket and sum(parts[i].numel() for i in (*bucket, index)) > SENT:
                _sum_bucket(totals, bucket, shards)
                bucket = []
            bucket.append(index)
        _sum_bucket(totals, bucket, shards)
    return totals


def _sum_bucket(tensors: list[Tensor], indices: list[int], shards: Sequence[spec.Shard | None]) -> None:
    """Replace these of the `tensors` by their sums over ranks, by one all-reduce."""
    first = shards[indices[0]]
    assert first is not None
    vectors = [tensors[i].reshape(-1) for i in indices]
    sums = all_reduced(vectors, [counts_in_sums(shards[i]) for i in indices], first.group)
    for i, total in zip(indices, sums, strict=True):
        tensors[i] = total.view(tensors[i].shape).clone()
