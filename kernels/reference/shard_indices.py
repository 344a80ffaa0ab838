"""The places of a shard's elements in the whole tensor, and their random numbers, which go by that place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..shard import Shard
from ..spec import Draw
from .random import STREAM_MASK, hash_, keys, sample_positions, uniform_bits


def along(shard: Shard, dim: int, device: torch.device) -> Tensor:
    """The whole tensor's index of every local index of one dimension: int64, 1-d."""
    parts = [torch.arange(start, start + count, device=device) for start, count in shard.runs[dim]]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=device)


def flat_indices(shard: Shard, device: torch.device) -> Tensor:
    """The whole tensor's flat (row-major) index of every local element, in local order: int64, 1-d."""
    lengths = [sum(count for _, count in runs) for runs in shard.runs]
    offset = shard.offset
    if offset is not None:
        return torch.arange(offset, offset + math.prod(lengths), device=device)
    indices, stride = torch.zeros((), dtype=torch.int64, device=device), 1
    for dim in reversed(range(len(shard.shape))):
        place = along(shard, dim, device) * stride
        indices = indices + place.reshape([-1 if d == dim else 1 for d in range(len(shard.shape))])
        stride *= shard.shape[dim]
    return indices.expand(lengths).reshape(-1)


def local_places(shard: Shard, flat: Tensor) -> tuple[Tensor, Tensor]:
    """The local flat index of each of these flat indices of the whole, and a bool for each: is it in this shard?

    The local index of one that is not in this shard is 0. Nothing waits for the device.
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
    cell = outer.reshape(-1, 1, 1) + piece.reshape(1, -1, 1)
    return cell.expand(-1, -1, inner).reshape(-1)


def bits_at(draw: Draw, address: int, indices: Tensor, numel: int, stream: int = STREAM_MASK) -> Tensor:
    """The numbers of `uniform_bits` at these indices of a tensor of `numel` elements: int32, shaped like `indices`."""
    numbers: Tensor | None = None
    for high in range(max((numel - 1) >> 32, 0) + 1):
        x = (indices & 0xFFFFFFFF).to(torch.int32)
        some = hash_(x, keys(draw, address, high, stream), torch.empty_like(x))
        numbers = some if numbers is None else torch.where(indices >> 32 == high, some, numbers)
    assert numbers is not None
    return numbers


def element_bits(shard: Shard, draw: Draw, address: int, device: torch.device, stream: int = STREAM_MASK) -> Tensor:
    """The random numbers of all local elements, by their places in the whole: int32, 1-d."""
    offset = shard.offset
    if offset is not None:
        count = math.prod(sum(length for _, length in runs) for runs in shard.runs)
        return uniform_bits(draw, address, count, offset=offset, device=device, stream=stream)
    return bits_at(draw, address, flat_indices(shard, device), shard.numel, stream)


def local_sample(shard: Shard, draw: Draw, address: int, device: torch.device) -> tuple[Tensor, Tensor, int] | None:
    """The sample of the whole tensor (`sample_positions`), seen from this shard; None if the sample is everything.

    Returns `local_places` of the sample's positions, and the number of positions.
    """
    positions = sample_positions(draw, address, shard.numel, device)
    return None if positions is None else (*local_places(shard, positions), positions.numel())
