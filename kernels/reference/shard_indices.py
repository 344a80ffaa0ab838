"""Where the elements of a shard lie in the whole tensor, and random numbers by that place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..spec import Draw, Shard
from .random import STREAM_MASK, hash_, keys, uniform_bits


def along(shard: Shard, dim: int, device: torch.device) -> Tensor:
    """The whole tensor's indices along one dimension, of the local ones: int64, 1-d."""
    parts = [torch.arange(start, start + count, device=device) for start, count in shard.runs[dim]]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=device)


def flat_indices(shard: Shard, device: torch.device) -> Tensor:
    """The whole tensor's flat (row-major) index of every local element, in local order: int64, 1-d."""
    lengths = [sum(count for _, count in runs) for runs in shard.runs]
    offset = shard.offset
    if offset is not None:
        return torch.arange(offset, offset + math.prod(lengths), device=device)
    found, stride = torch.zeros((), dtype=torch.int64, device=device), 1
    for dim in reversed(range(len(shard.shape))):
        place = along(shard, dim, device) * stride
        found = found + place.reshape([-1 if d == dim else 1 for d in range(len(shard.shape))])
        stride *= shard.shape[dim]
    return found.expand(lengths).reshape(-1)


def local_places(shard: Shard, flat: Tensor) -> tuple[Tensor, Tensor]:
    """Local flat indices of elements of the whole, by their flat indices there; and which of them are here at all.

    What is not here has the place 0, or any other. Nothing waits for the device.
    """
    place = torch.zeros_like(flat)
    here = torch.ones_like(flat, dtype=torch.bool)
    rest, stride = flat, 1
    for dim in reversed(range(len(shard.shape))):
        size, runs = shard.shape[dim], shard.runs[dim]
        at, rest = rest % size, rest // size
        inside, passed = torch.zeros_like(here), 0
        local = torch.zeros_like(flat)
        for start, count in runs:
            mine = (at >= start) & (at < start + count)
            local = torch.where(mine, at - start + passed, local)
            inside, passed = inside | mine, passed + count
        here &= inside
        place, stride = place + local * stride, stride * passed
    return torch.where(here, place, 0), here


def cells(shard: Shard, device: torch.device) -> Tensor:
    """The cell of every local element (`Shard.cells`), in local order, ascending: int64, 1-d."""
    runs = shard.runs[shard.cut]
    pieces = [torch.full((count,), place, device=device) for (_, count), place in zip(runs, shard.places, strict=False)]
    piece = torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64, device=device)
    outer, stride = torch.zeros((), dtype=torch.int64, device=device), shard.pieces
    for dim in reversed(range(shard.cut)):
        place = along(shard, dim, device) * stride
        outer = outer + place.reshape([-1 if d == dim else 1 for d in range(shard.cut)])
        stride *= shard.shape[dim]
    lengths = [sum(count for _, count in runs) for runs in shard.runs]
    inner = math.prod(lengths[shard.cut + 1 :])
    found = outer.reshape(-1, 1, 1) + piece.reshape(1, -1, 1)
    return found.expand(-1, -1, inner).reshape(-1)


def bits_at(draw: Draw, address: int, indices: Tensor, numel: int, stream: int = STREAM_MASK) -> Tensor:
    """`uniform_bits` of these indices of a tensor with `numel` elements: int32, shaped like them."""
    found: Tensor | None = None
    for high in range(max((numel - 1) >> 32, 0) + 1):
        x = (indices & 0xFFFFFFFF).to(torch.int32)
        some = hash_(x, keys(draw, address, high, stream), torch.empty_like(x))
        found = some if found is None else torch.where(indices >> 32 == high, some, found)
    assert found is not None
    return found


def element_bits(shard: Shard, draw: Draw, address: int, device: torch.device, stream: int = STREAM_MASK) -> Tensor:
    """The numbers of all local elements, by their place in the whole: int32, 1-d."""
    offset = shard.offset
    if offset is not None:
        count = math.prod(sum(length for _, length in runs) for runs in shard.runs)
        return uniform_bits(draw, address, count, offset=offset, device=device, stream=stream)
    return bits_at(draw, address, flat_indices(shard, device), shard.numel, stream)
