"""What of a DTensor is on this rank, as plain data: the one place that knows how tensors are cut up.

Note [layouts]: a parameter of FSDP2 or of tensor parallelism is a DTensor: a local tensor, and a placement for each
dimension of a mesh of ranks. Kernels get the local tensor and a `spec.Shard`, which says where in the whole it lies,
and over which processes a sum is a sum of the whole. That group is all ranks of the mesh, further replicas included:
they add zeros, so that nothing counts twice, and one group is enough for all placements on a mesh.
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

Runs = tuple[tuple[int, int], ...]
# By the world that they are of, and their ranks. Meshes of two worlds are equal where their ranks are, so that those
# are told apart by identity, and kept as long as they are known here.
_groups: dict[tuple[Any, tuple[int, ...]], Any] = {}
_shards: dict[Any, tuple[Any, spec.Shard | None]] = {}


def is_dtensor(tensor: object) -> bool:
    """Whether it is a DTensor; there are none where nobody has imported them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: Any) -> Any:
    """The local tensor of a DTensor, sharing its memory; anything else as it is."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def local_like(tensor: Tensor, param: Tensor) -> Tensor:
    """The local part of `tensor`, cut as `param` is: a gradient may come as sums that are still to be made."""
    if not is_dtensor(tensor) or not is_dtensor(param):
        return local_of(tensor)
    theirs: DTensor = tensor  # type: ignore[assignment]
    ours: DTensor = param  # type: ignore[assignment]
    if theirs.placements != ours.placements or theirs.device_mesh != ours.device_mesh:
        theirs = theirs.redistribute(ours.device_mesh, ours.placements)
    return theirs._local_tensor


def wrapped_like(local: Tensor, param: Tensor) -> Tensor:
    """A DTensor of `local`, cut as `param` is; a parameter that is no DTensor: `local` itself."""
    if not is_dtensor(param):
        return local
    from torch.distributed.tensor import DTensor

    like: DTensor = param  # type: ignore[assignment]
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def whole_sides(param: Tensor) -> frozenset[Literal["rows", "columns"]]:
    """Which sides of a 2-D DTensor are whole on each rank: of one that is sharded by rows, its columns.

    A mesh of one rank cuts nothing. Then its placements are asked, so that the answer is that of more ranks.
    """
    like: Any = param
    cuts = [(like.device_mesh.size(dim), p.dim) for dim, p in enumerate(like.placements) if _is_shard(p)]
    cut = {dim for size, dim in cuts if size > 1} or {dim for _, dim in cuts}
    sides: dict[Literal["rows", "columns"], int] = {"rows": 0, "columns": 1}
    return frozenset(side for side, dim in sides.items() if dim not in cut)


def is_first(param: Tensor) -> bool:
    """Whether this rank is the first of the parameter's mesh: one of those that count, and one only."""
    return not is_dtensor(param) or not any(param.device_mesh.get_coordinate() or ())  # type: ignore[attr-defined]


def shard_of(tensor: Tensor) -> spec.Shard | None:
    """Where the local part of a DTensor lies; None where all of it is here (replicated, or no DTensor at all).

    Raises:
        ValueError: the placements are not such that each element is on one rank and its replicas. The message goes on
            after the parameter's name.
    """
    if not is_dtensor(tensor):
        return None
    param: DTensor = tensor  # type: ignore[assignment]
    mesh, placements = param.device_mesh, tuple(param.placements)
    key = id(mesh), placements, tuple(param.shape)
    if key not in _shards:
        _shards[key] = mesh, _made(mesh, placements, tuple(param.shape))
    shard = _shards[key][1]
    here = tuple(param._local_tensor.shape)
    if shard is not None and here != tuple(sum(length for _, length in runs) for runs in shard.runs):
        raise ValueError(
            f"has the shape {tuple(param.shape)} and is cut up as {placements} over {tuple(mesh.shape)} ranks, and "
            f"{here} is here: not what torch.chunk would leave"
        )
    return shard


def _made(mesh: Any, placements: Sequence[Any], shape: tuple[int, ...]) -> spec.Shard | None:
    odd = [p for p in placements if not (p.is_replicate() or _is_shard(p))]
    if odd:
        raise ValueError(f"has the placement {odd[0]}; a parameter must be sharded or replicated on each dimension")
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
    """The coordinates of all ranks that have different parts."""
    sharding = {dim for dim, _ in cuts}
    ranges = [range(mesh.size(dim)) if dim in sharding else range(1) for dim in range(mesh.ndim)]
    return (list(at) for at in itertools.product(*ranges))


def _runs(mesh: Any, cuts: Sequence[tuple[int, Any]], dim: int, size: int, coordinate: Sequence[int]) -> Runs:
    """Which indices of this dimension the rank at this coordinate has: cut from the mesh's first dimension on."""
    runs: Runs = ((0, size),) if size else ()
    for mesh_dim, placement in cuts:
        if placement.dim != dim:
            continue
        many, which = mesh.size(mesh_dim), coordinate[mesh_dim]
        factor = getattr(placement, "split_factor", 1)  # of a strided shard: parts of which each is cut
        parts = [_chunk(runs, factor, part) for part in range(factor)]
        runs = _joined(run for part in parts for run in _chunk(part, many, which))
    return runs


def _chunk(runs: Runs, many: int, which: int) -> Runs:
    """The part number `which` of `torch.chunk(..., many)`, the last ones short or empty."""
    length = sum(count for _, count in runs)
    size = -(-length // many)
    first, last = min(which * size, length), min((which + 1) * size, length)
    found, passed = [], 0
    for start, count in runs:
        low, high = max(first - passed, 0), min(last - passed, count)
        if low < high:
            found.append((start + low, high - low))
        passed += count
    return tuple(found)


def _joined(runs: Iterator[tuple[int, int]]) -> Runs:
    """Runs that follow each other become one."""
    found: list[tuple[int, int]] = []
    for start, count in runs:
        if found and sum(found[-1]) == start:
            found[-1] = found[-1][0], found[-1][1] + count
        else:
            found.append((start, count))
    return tuple(found)


def group_of(mesh: Any) -> Any:
    """The process group of all ranks of a mesh: one for each set of ranks, whatever meshes and groups there are of it.

    Made where there is none, for meshes of several dimensions: all their ranks have to ask for it then.
    """
    ranks = tuple(sorted(mesh.mesh.flatten().tolist()))
    world = torch.distributed.group.WORLD
    if len(ranks) == torch.distributed.get_world_size():
        return world
    if (world, ranks) not in _groups:
        made = mesh.ndim > 1
        group = torch.distributed.new_group(list(ranks), use_local_synchronization=True) if made else mesh.get_group()
        _groups[world, ranks] = group
    return _groups[world, ranks]
