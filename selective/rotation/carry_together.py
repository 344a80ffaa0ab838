"""Carrying the moments of many parameters of one shape into their new bases, with as many operations as for one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from selective.preconditioner import Carry, Shape
from selective.preconditioner.linalg import batches, copy_to, per_matrix
from selective.preconditioner.matrices import lies_in_order
from selective.rotation.basis import Carried
from selective.rotation.carry import MomentCarrier
from selective.rotation.moments import Entry, entries_of

CARRIED = 2**25
"""Elements of the moments that are carried together, 128 MiB of each in float32; a step has some five times that."""


def carry_together(
    carrier: MomentCarrier, params: Sequence[Tensor], shape: Shape, maps: Carry, valid: Tensor | None
) -> None:
    """Carry all moments of these parameters, whose matrices are of `shape`, into their new bases.

    The maps are those of all matrices, [count * batch, ., .]. Moments of a parameter stay as they are where `valid`
    (bool [count]) is False.
    """
    if all(each is None for each in maps):
        return
    batch = shape[0]
    for part in batches(len(params), math.prod(shape), CARRIED):
        some = [entries_of(carrier.base, p, carrier.moments, shape) for p in params[part]]
        here = slice(part.start * batch, part.stop * batch)
        maps_here = Carry(*(None if each is None else each[here] for each in maps))
        valid_here = None if valid is None else valid[part]
        if _are_alike(some, shape):
            _carry_stacked(carrier, some, shape, maps_here, valid_here)
            continue
        for number, p in enumerate(params[part]):
            matrices = slice(number * batch, (number + 1) * batch)
            own = Carry(*(None if each is None else each[matrices] for each in maps_here))
            carrier.carry(p, shape, Carried(0, own, None if valid_here is None else valid_here[number]))


def _are_alike(some: Sequence[Sequence[Entry]], shape: Shape) -> bool:
    """True if all parameters have the same entries, each shaped like its parameter, with matrices one after another."""
    forms = {tuple((e.name, e.tensor.dtype, e.tensor.shape, type(e.tensor)) for e in entries) for entries in some}
    first = some[0]
    plain = all(type(e.tensor) is Tensor and lies_in_order(e.tensor.shape, shape) for e in first)
    return len(forms) == 1 and plain and all(e.shape == shape for e in first)


def _carry_stacked(
    carrier: MomentCarrier, some: Sequence[Sequence[Entry]], shape: Shape, maps: Carry, valid: Tensor | None
) -> None:
    """Copy the entries into stacks, carry these, and copy them back. A single parameter's are carried in place."""
    batch, rows, columns = shape
    whole = (len(some) * batch, rows, columns)
    stacks: list[Entry] = list(some[0])
    copies: list[tuple[list[Tensor], list[Tensor]]] = []
    if len(some) > 1 or not all(entry.tensor.is_contiguous() for entry in stacks):
        stacks = []
        for entries in zip(*some, strict=True):
            tensors = [entry.tensor for entry in entries]
            stack = torch.empty(whole, dtype=tensors[0].dtype, device=tensors[0].device)
            parts = [part.view(tensors[0].shape) for part in stack.split(batch)]
            copy_to(parts, tensors)
            copies.append((tensors, parts))
            stacks.append(replace(entries[0], tensor=stack, shape=whole))
    by_matrix = valid
    if valid is not None:
        by_matrix = per_matrix(valid if batch == 1 else valid.repeat_interleave(batch, output_size=whole[0]))
    carrier.carry_entries(stacks, (), whole, maps, by_matrix, some_stay=valid is not None and batch > 1)
    for tensors, parts in copies:
        copy_to(tensors, parts)
