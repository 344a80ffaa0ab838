"""DTensors as plain data: this rank's part, and its place in the whole. No other module knows how tensors are sharded.

Note [layouts]: a parameter of FSDP2 or of tensor parallelism is a DTensor, which has a local tensor, and a placement
for each dimension of a mesh of ranks. Kernels get the local tensor and a `spec.Shard`. The shard says where in the
whole the local tensor lies, and over which process group a sum is a sum over the whole. That group has all ranks of the
mesh, also further replicas. These add zeros, so that nothing counts twice, and one group is enough for all placements
on a mesh.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from selective.kernels import spec

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Runs = tuple[tuple[int, int], ...]  # first index and length of each run of indices
# Process groups by world and ranks.
_groups: dict[tuple[Any, tuple[int, ...]], Any] = {}
# Meshes and shards by the mesh's identity, placements and shape. Meshes of two worlds compare equal if their ranks do,
# so identity is used; the mesh is stored, so that no other object gets its id.
_shards: dict[Any, tuple[Any, spec.Shard | None]] = {}


def is_dtensor(tensor: object) -> bool:
    """True if `tensor` is a DTensor; there are none if nobody has imported the module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: Any) -> Any:
    """Return the local tensor of a DTensor, which shares its memory, and anything else as it is."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def local_like(tensor: Tensor, param: Tensor) -> Tensor:
    """Return the local part of `tensor`, sharded like `param`.

    A tensor with other placements is redistributed: a gradient may consist of partial sums, which are added up then.
    """
    if not is_dtensor(tensor) or not is_dtensor(param):
        return local_of(tensor)
    dtensor: DTensor = tensor  # type: ignore[assignment]
    like: DTensor = param  # type: ignore[assignment]
    if dtensor.placements != like.placements or dtensor.device_mesh != like.device_mesh:
        dtensor = dtensor.redistribute(like.device_mesh, like.placements)
    return dtensor._local_tensor


def wrapped_like(local: Tensor, param: Tensor) -> Tensor:
    """Return a DTensor with the local part `local`, sharded like `param`; `local` itself if `param` is no DTensor."""
    if not is_dtensor(param):
        return local
    from torch.distributed.tensor import DTensor

    like: DTensor = param  # type: ignore[assignment]
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def whole_sides(param: Tensor) -> frozenset[Literal["rows", "columns"]]:
    """Return the sides of a 2-D DTensor that are whole on each rank: the columns, if it is sharded by rows.

    On a mesh of one rank the placements decide, so that the answer is the same as on more ranks.
    """
    like: Any = param
    cuts = [(like.device_mesh.size(dim), p.dim) for dim, p in enumerate(like.placements) if _is_shard(p)]
    cut = {dim for size, dim in cuts if size > 1} or {dim for _, dim in cuts}
    sides: dict[Literal["rows", "columns"], int] = {"rows": 0, "columns": 1}
    return frozenset(side for side, dim in sides.items() if dim not in cut)


def is_first(param: Tensor) -> bool:
    """True on exactly one rank of the parameter's mesh, whose part counts in sums."""
    return not is_dtensor(param) or not any(param.device_mesh.get_coordinate() or ())  # type: ignore[attr-defined]


def shard_of(tensor: Tensor) -> spec.Shard | None:
    """Return the place of a DTensor's local part in the whole; None if it is the whole (replicated, or no DTensor).

    Raises:
        ValueError: the placements do not put each element on one rank and its replicas. The message continues a
            sentence that begins with the parameter's name.
    """
    if not is_dtensor(tensor):
        return None
    param: DTensor = tensor  # type: ignore[assignment]
    mesh, placements = param.device_mesh, tuple(param.placements)
    key = id(mesh), placements, tuple(param.shape)
    if key not in _shards:
        _shards[key] = mesh, _new_shard(mesh, placements, tuple(param.shape))
    shard = _shards[key][1]
    here = tuple(param._local_tensor.shape)
    if shard is not None and here != tuple(sum(length for _, length in runs) for runs in shard.runs):
        raise ValueError(
            f"has the shape {tuple(param.shape)} and is cut up as {placements} over {tuple(mesh.shape)} ranks, and "
            f"{here} is here: not what torch.chunk would leave"
        )
    return shard


def _new_shard(mesh: Any, placements: Sequence[Any], shape: tuple[int, ...]) -> spec.Shard | None:
    """Make the shard of this rank for `shard_of`, which keeps it."""
    unsupported = [p for p in placements if not (p.is_replicate() or _is_shard(p))]
    if unsupported:
        raise ValueError(
            f"has the placement {unsupported[0]}; a parameter must be sharded or replicated on each dimension"
        )
    cuts = [(dim, p) for dim, p in enumerate(placements) if _is_shard(p) and mesh.size(dim) > 1]
    if not cuts:
        return None
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(f"is of a mesh of {tuple(mesh.shape)} ranks in which this rank is not; leave it out here")
    runs = tuple(_runs(mesh, cuts, dim, size, coordinate) for dim, size in enumerate(shape))
    cut = max(p.dim for _, p in cuts)
    pieces = sorted({run for at in _coordinates(mesh, cuts) for run in _runs(mesh, cuts, cut, shape[cut], at)})
    number = {run: place for place, run in enumerate(pieces)}
    sharding = {dim for dim, _ in cuts}
    by_one = all(p.dim == cut for _, p in cuts)
    most = max(len(_runs(mesh, cuts, cut, shape[cut], at)) for at in _coordinates(mesh, cuts))
    most_rows = max(len(_runs(mesh, cuts, 0, shape[0], at)) for at in _coordinates(mesh, cuts))
    return spec.Shard(
        shape=shape,
        runs=runs,
        group=group_of(mesh),
        counted=all(c == 0 for dim, c in enumerate(coordinate) if dim not in sharding),
        cut=cut,
        pieces=max(len(pieces), 1),
        places=tuple(number[run] for run in runs[cut]),
        stretches=by_one and most <= 1 and math.prod(shape[:cut]) == 1,
        row_stretches=most_rows <= 1,
    )


def _is_shard(placement: Any) -> bool:
    return hasattr(placement, "dim") and (placement.is_shard() or hasattr(placement, "split_factor"))


def _coordinates(mesh: Any, cuts: Sequence[tuple[int, Any]]) -> Iterator[list[int]]:
    """Iterate over the mesh coordinates of ranks with different parts, one for each part."""
    sharding = {dim for dim, _ in cuts}
    ranges = [range(mesh.size(dim)) if dim in sharding else range(1) for dim in range(mesh.ndim)]
    return (list(at) for at in itertools.product(*ranges))


def _runs(mesh: Any, cuts: Sequence[tuple[int, Any]], dim: int, size: int, coordinate: Sequence[int]) -> Runs:
    """Return the indices of dimension `dim` that the rank at this coordinate has.

    The dimensions of the mesh cut it one after the other, the first one first.
    """
    runs: Runs = ((0, size),) if size else ()
    for mesh_dim, placement in cuts:
        if placement.dim != dim:
            continue
        count, number = mesh.size(mesh_dim), coordinate[mesh_dim]
        factor = getattr(placement, "split_factor", 1)  # a strided shard has this many parts, each of which is cut
        parts = [_chunk(runs, factor, part) for part in range(factor)]
        runs = _joined(run for part in parts for run in _chunk(part, count, number))
    return runs


def _chunk(runs: Runs, chunks: int, number: int) -> Runs:
    """Return chunk `number` as `torch.chunk(..., chunks)` cuts: the last chunks are shorter or empty."""
    length = sum(count for _, count in runs)
    size = -(-length // chunks)
    first, last = min(number * size, length), min((number + 1) * size, length)
    chunk, passed = [], 0
    for start, count in runs:
        low, high = max(first - passed, 0), min(last - passed, count)
        if low < high:
            chunk.append((start + low, high - low))
        passed += count
    return tuple(chunk)


def _joined(runs: Iterator[tuple[int, int]]) -> Runs:
    """Join runs that follow each other without a gap."""
    joined: list[tuple[int, int]] = []
    for start, count in runs:
        if joined and sum(joined[-1]) == start:
            joined[-1] = joined[-1][0], joined[-1][1] + count
        else:
            joined.append((start, count))
    return tuple(joined)


def group_of(mesh: Any) -> Any:
    """Return the process group of all ranks of a mesh: the same one for all meshes of these ranks.

    For a mesh of several dimensions it is created by the first call, which all ranks of the mesh have to make.
    """
    ranks = tuple(sorted(mesh.mesh.flatten().tolist()))
    world = torch.distributed.group.WORLD
    if len(ranks) == torch.distributed.get_world_size():
        return world
    if (world, ranks) not in _groups:
        if mesh.ndim > 1:
            group = torch.distributed.new_group(list(ranks), use_local_synchronization=True)
        else:
            group = mesh.get_group()
        _groups[world, ranks] = group
    return _groups[world, ranks]
