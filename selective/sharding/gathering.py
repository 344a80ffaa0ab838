"""Whole tensors where a policy's own code has to see them, and the part of its answer that is this rank's.

`full_tensor` is an all-gather of the tensor's size: all ranks of its mesh call it for the same tensors in one order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selective.kernels import spec
from selective.sharding.dtensor import is_dtensor, shard_of, wrapped_like


def whole_like(local: Tensor | None, param: Tensor) -> Tensor | None:
    """The whole of what `local` is this rank's part of, cut as `param` is."""
    return None if local is None else whole_of(wrapped_like(local, param))


def whole_of(tensor: Any) -> Tensor:
    """A DTensor's whole; anything else as it is."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def part_of(whole: Tensor, shard: spec.Shard | None) -> Tensor:
    """This rank's part of a tensor that broadcasts to the whole one; dimensions of size 1 stay."""
    if shard is None:
        return whole
    part = whole
    missing = len(shard.shape) - whole.dim()
    for dim in range(whole.dim()):
        size, runs = shard.shape[dim + missing], shard.runs[dim + missing]
        if whole.shape[dim] != size or runs == ((0, size),):
            continue
        pieces = [part.narrow(dim, start, count) for start, count in runs] or [part.narrow(dim, 0, 0)]
        part = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
    return part


def cut_like(value: Tensor, param: Tensor) -> Tensor:
    """State shaped like a sharded parameter, cut as that is, so that checkpoints can reshard it; others as they are."""
    if is_dtensor(value) or not is_dtensor(param) or value.dim() == 0 or value.shape != param.shape:
        return value
    return wrapped_like(part_of(value, shard_of(param)).clone(), param)
