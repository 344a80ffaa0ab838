"""What ranks that share tensors have to decide alike, or some would step and others not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from selective.capture.layout import shard_of


def seen_by_all(flags: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[bool]:
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
