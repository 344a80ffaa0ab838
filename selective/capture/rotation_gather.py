"""Sharded matrices that are rotated on a side which is cut: gathered, rotated as on one device, cut up again.

A matrix is gathered by an all-reduce of zeros with each rank's part in its place. That sends twice what an all-gather
would, and needs to know nothing of how the others' parts lie: rows, columns, both, strided shards, replicas. Every rank
then makes the whole product and keeps its part, and the running averages are whole on each.

Note [gathered refresh]: what a refresh makes on one rank goes to all, as integers, with the maps for the moments. So
the ranks can't come to differ in a basis, as in Note [sharded refresh].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from selective.capture.rotation_checks import check_refreshed, check_states
from selective.capture.rotation_shards import Sharded, bits_of, cut_into_lots, nothing_of, owners, sums
from selective.kernels import spec
from selective.preconditioner import Carry, Preconditioner, Shape, State

Change = Callable[[Tensor], Tensor]


def wholes(parts: Sequence[Tensor], shard: spec.Shard, shape: Shape) -> list[Tensor]:
    """The whole matrices [1, m, n], float32, of which these [1, ., .] are this rank's parts; all cut alike."""
    buffer = torch.zeros((len(parts), *shape[1:]), dtype=torch.float32, device=parts[0].device)
    if shard.counted:
        mine = torch.cat([part.to(torch.float32) for part in parts])
        row = 0
        for first, count in shard.runs[0]:
            column = 0
            for left, width in shard.runs[1]:
                here = mine[:, row : row + count, column : column + width]
                buffer[:, first : first + count, left : left + width] = here
                column += width
            row += count
    torch.distributed.all_reduce(buffer, group=shard.group)
    return list(buffer.split(1))


def part_of(whole: Tensor, shard: spec.Shard) -> Tensor:
    """This rank's part [1, ., .] of a whole [1, m, n]; contiguous."""
    found = whole
    for dim, runs in ((1, shard.runs[0]), (2, shard.runs[1])):
        pieces = [found.narrow(dim, first, count) for first, count in runs]
        found = torch.cat(pieces, dim) if pieces else found.narrow(dim, 0, 0)
    return found.contiguous()


def on_wholes(shard: spec.Shard, shape: Shape, change: Change) -> Change:
    """`change` of a whole matrix, as one of this rank's part."""
    return lambda x: part_of(change(wholes([x], shard, shape)[0]), shard)


def refresh_gathered(
    preconditioner: Preconditioner, due: Mapping[int, Sharded], gradients: Callable[[list[int]], list[Tensor]]
) -> dict[int, Carry | None]:
    """New bases of these in their states, each made on one rank; the carries by index, in the same order on all ranks.

    `gradients`: the wholes, asked for where the preconditioner reads them.
    """
    found: dict[int, Carry | None] = {}
    reads = preconditioner.refreshes_from_gradients()
    for group, indices in cut_into_lots(due):
        grads = gradients(indices) if reads else [nothing_of(due[i], due[i].whole) for i in indices]
        ranks = torch.distributed.get_world_size(group)
        solvers = owners([max(due[i].whole[1:]) for i in indices], ranks)
        here = [k for k, owner in enumerate(solvers) if owner == torch.distributed.get_rank(group)]
        names = [sorted(n for n in due[i].state if preconditioner.refresh_writes(n)) for i in indices]
        rows = [_blank(due[i], kept) for i, kept in zip(indices, names, strict=True)]
        for same in _alike(here, [due[i] for i in indices]):
            states = [{**due[indices[k]].state, **_copies(due[indices[k]].state, names[k])} for k in same]
            given = [dict(state) for state in states]
            made = preconditioner.refresh(states, [grads[k] for k in same])
            check_refreshed(made, [due[indices[k]].whole for k in same])
            check_states(given, states)
            for k, state, carry in zip(same, states, made, strict=True):
                rows[k] = _encoded([state[name] for name in names[k]], carry, due[indices[k]])
        rows = sums(rows, group)
        flags = torch.stack([row[-1] for row in rows]).tolist()  # waits for the device, as a refresh does
        for i, kept, row, flag in zip(indices, names, rows, flags, strict=True):
            found[i] = _decoded(row, flag, [due[i].state[name] for name in kept], due[i])
    return found


def _alike(places: Sequence[int], bases: Sequence[Sharded]) -> list[list[int]]:
    by_shape: dict[Shape, list[int]] = {}
    for k in places:
        by_shape.setdefault(bases[k].whole, []).append(k)
    return list(by_shape.values())


def _copies(state: State, names: Sequence[str]) -> State:
    return {name: state[name].clone() for name in names}


def _fields(basis: Sharded) -> list[Tensor]:
    """What a `Carry` may have, empty, in its order."""
    (_, m, n), device = basis.whole, basis.device
    return [
        torch.zeros(shape, dtype=dtype, device=device)
        for shape, dtype in (
            ((1, m, m), torch.float32), ((1, n, n), torch.float32), ((1, m), torch.int64), ((1, n), torch.int64),
        )
    ]  # fmt: skip


def _blank(basis: Sharded, names: Sequence[str]) -> Tensor:
    tensors = [*(basis.state[name] for name in names), *_fields(basis)]
    count = sum(x.numel() * x.element_size() // 4 for x in tensors) + 1
    return torch.zeros(count, dtype=torch.int32, device=basis.device)


def _encoded(values: Sequence[Tensor], carry: Carry | None, basis: Sharded) -> Tensor:
    """States, maps, and last which maps there are: 0 where nothing is new, else 1 and a bit for each."""
    maps = [None] * 4 if carry is None else list(carry)
    filled = [empty if x is None else x for x, empty in zip(maps, _fields(basis), strict=True)]
    flag = 0 if carry is None else 1 + sum(2 << place for place, x in enumerate(maps) if x is not None)
    last = torch.full((1,), flag, dtype=torch.int32, device=basis.device)
    return torch.cat([*(bits_of(x, basis.device) for x in (*values, *filled)), last])


def _decoded(row: Tensor, flag: int, values: Sequence[Tensor], basis: Sharded) -> Carry | None:
    """Write the states; the carry."""
    maps, start = _fields(basis), 0
    for value in (*values, *maps):
        end = start + value.numel() * value.element_size() // 4
        value.copy_(row[start:end].clone().view(value.dtype).reshape(value.shape))
        start = end
    return Carry(*(x if flag & (2 << place) else None for place, x in enumerate(maps))) if flag else None
