"""Gathering of whole tensors for a policy's own code, and cutting of whole tensors into this rank's part.

`full_tensor` is an all-gather: all ranks of the mesh have to call it for the same tensors in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selective.kernels import spec
from selective.sharding.dtensor import is_dtensor, shard_of, wrapped_like


def whole_like(local: Tensor | None, param: Tensor) -> Tensor | None:
    """All-gather `local`, which is sharded like `param`; None stays None."""
    return None if local is None else whole_of(wrapped_like(local, param))


def whole_of(tensor: Any) -> Tensor:
    """All-gather a DTensor; return anything else as it is."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def part_of(whole: Tensor, shard: spec.Shard | None) -> Tensor:
    """Return this rank's part of a tensor that broadcasts to the whole; dimensions of size 1 stay."""
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
    """Shard `value` like `param` if it has its shape, so that checkpoints can reshard it; others stay as they are."""
    if is_dtensor(value) or not is_dtensor(param) or value.dim() == 0 or value.shape != param.shape:
        return value
    return wrapped_like(part_of(value, shard_of(param)).clone(), param)
