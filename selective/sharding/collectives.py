"""What ranks that share tensors have to decide alike, or some would step and others not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from selective.kernels import spec
from selective.sharding.dtensor import shard_of


def seen_by_any_rank(flags: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[bool]:
    """What any rank has seen of each tensor, and one flag more: what was seen of tensors that are on others only.

    `flags`: 0-d bool, of this rank's part of each of `tensors`. One all-reduce for each mesh, of smaller ones first,
    with what was seen before: so where meshes lie within each other, as those of a model do, all ranks of the largest
    know all. Waits for the device.
    """
    if not flags:
        return []
    shards = [shard_of(tensor) for tensor in tensors]
    found = torch.stack([flag.to(flags[0].device) for flag in flags]).to(torch.int32)
    seen = torch.cat([found, found.new_zeros(1)])
    for group, places in _by_group(shards):
        here = torch.tensor([*places, len(flags)], dtype=torch.int64, device=found.device)
        seen[-1] = seen.max()
        some = seen[here]
        torch.distributed.all_reduce(some, op=torch.distributed.ReduceOp.MAX, group=group)
        seen[here] = some
    return [bool(value) for value in seen.tolist()]


def _by_group(shards: Sequence[Any]) -> list[tuple[Any, list[int]]]:
    """The process groups, small ones first, with the places of their tensors."""
    together: dict[int, tuple[Any, list[int]]] = {}
    for place, shard in enumerate(shards):
        if shard is not None:
            together.setdefault(id(shard.group), (shard.group, []))[1].append(place)
    return sorted(together.values(), key=lambda one: torch.distributed.get_world_size(one[0]))


# Elements that go over the wire at once, 256 MiB: a refresh needs as much memory for each of its two collectives.
SENT = 2**26


def _counted(shard: spec.Shard | None) -> bool:
    return shard is None or shard.counted


def _summed(vectors: Sequence[Tensor], counted: Sequence[bool], group: Any) -> list[Tensor]:
    """The sum over ranks of each of these 1-d tensors: one all-reduce."""
    buffer = torch.cat([v if counts else torch.zeros_like(v) for v, counts in zip(vectors, counted, strict=True)])
    torch.distributed.all_reduce(buffer, group=group)
    return list(buffer.split([v.numel() for v in vectors]))


def sums(rows: Sequence[Tensor], group: Any) -> list[Tensor]:
    """Of what one rank has of each, and the others zeros: what it has."""
    return _summed(rows, [True] * len(rows), group)


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """Which rank solves which: the dearest first (n³), each to the rank with the least; the same on all ranks."""
    load, found = [0] * ranks, [0] * len(sizes)
    for k in sorted(range(len(sizes)), key=lambda k: -sizes[k]):
        found[k] = load.index(min(load))
        load[found[k]] += sizes[k] ** 3
    return found


def bits_of(value: Tensor, device: torch.device) -> Tensor:
    """Of float32 and int64 alike: int32, 1-d."""
    return value.to(device).reshape(-1).contiguous().view(torch.int32)


def write_bits(row: Tensor, values: Iterable[Tensor]) -> int:
    """Back into these, in place, from the row's beginning; where they end in it."""
    start = 0
    for value in values:
        end = start + value.numel() * value.element_size() // 4
        value.copy_(row[start:end].clone().view(value.dtype).reshape(value.shape))
        start = end
    return start


def sums_over_ranks(parts: Sequence[Tensor], shards: Sequence[spec.Shard | None]) -> list[Tensor]:
    """The whole of each, of which every rank has a part: an all-reduce for each group, device, dtype and 256 MiB."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for index, (part, shard) in enumerate(zip(parts, shards, strict=True)):
        assert shard is not None
        alike.setdefault((id(shard.group), part.device, part.dtype), []).append(index)
    found: list[Tensor] = list(parts)
    for indices in alike.values():
        some: list[int] = []
        for index in indices:
            if some and sum(parts[i].numel() for i in (*some, index)) > SENT:
                _sum_into(found, some, shards)
                some = []
            some.append(index)
        _sum_into(found, some, shards)
    return found


def _sum_into(found: list[Tensor], indices: list[int], shards: Sequence[spec.Shard | None]) -> None:
    first = shards[indices[0]]
    assert first is not None
    vectors = [found[i].reshape(-1) for i in indices]
    sums = _summed(vectors, [_counted(shards[i]) for i in indices], first.group)
    for i, one in zip(indices, sums, strict=True):
        found[i] = one.view(found[i].shape).clone()
