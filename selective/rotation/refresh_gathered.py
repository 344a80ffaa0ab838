"""The refresh of sharded matrices that are gathered because a side is rotated which is not whole on each rank.

A matrix is gathered by an all-reduce of zeros with each rank's part in its place. That sends twice the bytes of an
all-gather, but a rank need not know how the other parts lie: rows, columns, both, strided shards, replicas. Every rank
computes the whole product and keeps its part. Running averages are whole on each rank.

Note [gathered refresh]: each basis is computed on one rank, and its state and the maps for the moments go to all ranks
as integers. So the bases cannot differ between ranks, as in Note [sharded refresh]. Before that, an integer for each
matrix is exchanged: it says which maps there are, if part of the gradient was not finite, and if a rank has failed. If
one has, all raise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from selective.kernels import spec
from selective.preconditioner import Carry, Preconditioner, Shape, State
from selective.rotation.contract import check_refreshed, check_states
from selective.rotation.refresh_sharded import Sharded, cut_into_buckets, unread_gradient
from selective.sharding.collectives import bits_of, from_owners, owners, write_bits

Change = Callable[[Tensor], Tensor]  # takes and returns float32 [1, rows, columns]


def gather_matrices(parts: Sequence[Tensor], shard: spec.Shard, shape: Shape) -> list[Tensor]:
    """All-reduce the parts [1, ., .] of this rank to whole matrices [1, m, n] in float32; all have the same `shard`."""
    buffer = torch.zeros((len(parts), *shape[1:]), dtype=torch.float32, device=parts[0].device)
    if shard.counted:
        stacked = torch.cat([part.to(torch.float32) for part in parts])
        row = 0
        for first, count in shard.runs[0]:
            column = 0
            for left, width in shard.runs[1]:
                here = stacked[:, row : row + count, column : column + width]
                buffer[:, first : first + count, left : left + width] = here
                column += width
            row += count
    torch.distributed.all_reduce(buffer, group=shard.group)
    return list(buffer.split(1))


def part_of(whole: Tensor, shard: spec.Shard) -> Tensor:
    """Return this rank's part [1, ., .] of a whole matrix [1, m, n]; contiguous."""
    part = whole
    for dim, runs in ((1, shard.runs[0]), (2, shard.runs[1])):
        pieces = [part.narrow(dim, first, count) for first, count in runs]
        part = torch.cat(pieces, dim) if pieces else part.narrow(dim, 0, 0)
    return part.contiguous()


def through_gather(shard: spec.Shard, shape: Shape, change: Change) -> Change:
    """Turn a change of a whole matrix into one of this rank's part, which gathers the matrix."""
    return lambda x: part_of(change(gather_matrices([x], shard, shape)[0]), shard)


def refresh_gathered(
    preconditioner: Preconditioner, due: Mapping[int, Sharded], missing: Mapping[int, Tensor],
    gradients: Callable[[list[int]], list[Tensor]],
) -> Iterator[dict[int, Carry | None]]:  # fmt: skip
    """Refresh the bases in their states, bucket by bucket, and yield the carries by index, the same on all ranks.

    `missing` is 0-d bool for each: True if this rank's part of the gradient is not finite. Then no rank gets a new
    basis. `gradients` returns whole gradients; it is called only if the preconditioner reads them.
    """
    reads = preconditioner.refreshes_from_gradients()
    for group, indices in cut_into_buckets(due, lambda basis: basis.whole[1] * basis.whole[2] if reads else 0):
        bases = [due[i] for i in indices]
        grads = gradients(indices) if reads else [unread_gradient(basis, basis.whole) for basis in bases]
        solvers = owners([max(b.whole[1:]) for b in bases], torch.distributed.get_world_size(group))
        here = [k for k, owner in enumerate(solvers) if owner == torch.distributed.get_rank(group)]
        solved = _Solved(preconditioner, bases, grads, here)
        flags = torch.tensor([[flag, 0] for flag in solved.flags], dtype=torch.int32, device="cpu").to(bases[0].device)
        flags[:, 1] = torch.stack([missing[i] for i in indices]).to(torch.int32)
        (all_flags,) = from_owners([flags.view(-1)], group)
        agreed = all_flags.view(-1, 2).tolist()  # waits for the device, as a refresh does
        if any(flag & FAILED for flag, _ in agreed):
            raise solved.error or RuntimeError("it failed on another rank, whose error says how")
        rows = from_owners([solved.row(k, flag) for k, (flag, _) in enumerate(agreed)], group)
        carries: dict[int, Carry | None] = dict.fromkeys(indices)
        for k, (flag, spoilt) in enumerate(agreed):
            if not spoilt:
                carries[indices[k]] = solved.decoded(rows[k], k, flag)
        yield carries


FAILED = 32  # a bit of a flag; 1: there is a carry; 2, 4, 8, 16: the carry has this field
_FIELDS = ("left", "right", "rows", "columns")


class _Solved:
    """The new states and carries that this rank has computed for a bucket, and their form for the other ranks."""

    def __init__(
        self, preconditioner: Preconditioner, bases: Sequence[Sharded], grads: Sequence[Tensor], here: Sequence[int]
    ) -> None:
        self.bases, self.flags, self.error = bases, [0] * len(bases), None
        self.names = [sorted(n for n in basis.state if preconditioner.refresh_writes(n)) for basis in bases]
        self.states: dict[int, State] = {}
        self.carries: dict[int, Carry | None] = {}
        by_shape: dict[Shape, list[int]] = {}
        for k in here:
            by_shape.setdefault(bases[k].whole, []).append(k)
        try:
            for bucket in by_shape.values():
                self._solve(preconditioner, bucket, [grads[k] for k in bucket])
        except Exception as error:  # broad: the other ranks wait in a collective. They are told, and all raise
            self.error: Exception | None = error
            for k in here:
                self.flags[k] = FAILED

    def _solve(self, preconditioner: Preconditioner, bucket: list[int], grads: list[Tensor]) -> None:
        """Refresh copies of the states: an error, or a gradient that is not finite, may undo the refresh."""
        states = []
        for k in bucket:
            state = self.bases[k].state
            states.append({**state, **{name: state[name].clone() for name in self.names[k]}})
        before = [dict(state) for state in states]
        clean = [grad.masked_fill(~grad.isfinite().all(), 0.0) for grad in grads]
        carries = preconditioner.refresh(states, clean)
        check_refreshed(carries, [self.bases[k].whole for k in bucket])
        check_states(before, states)
        for k, state, carry in zip(bucket, states, carries, strict=True):
            self.states[k], self.carries[k] = state, carry
            if carry is not None:
                self.flags[k] = 1 + sum(2 << place for place, x in enumerate(carry) if x is not None)

    def _targets(self, k: int, flag: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return the state entries that a refresh writes, and zeros for the maps of this flag."""
        (_, m, n), device = self.bases[k].whole, self.bases[k].device
        sizes = {"left": (1, m, m), "right": (1, n, n), "rows": (1, m), "columns": (1, n)}
        kinds = {"left": torch.float32, "right": torch.float32, "rows": torch.int64, "columns": torch.int64}
        present = [name for place, name in enumerate(_FIELDS) if flag & (2 << place)]
        maps = {name: torch.zeros(sizes[name], dtype=kinds[name], device=device) for name in present}
        return [self.bases[k].state[name] for name in self.names[k]], maps

    def row(self, k: int, flag: int) -> Tensor:
        """Return the state and maps of one matrix as 1-d int32; zeros if it was not solved on this rank."""
        device = self.bases[k].device
        if k not in self.states:
            state, maps = self._targets(k, flag)
            count = sum(x.numel() * x.element_size() // 4 for x in (*state, *maps.values()))
            return torch.zeros(count, dtype=torch.int32, device=device)
        carry = self.carries[k]
        maps = [] if carry is None else [x for x in carry if x is not None]
        return torch.cat([bits_of(x, device) for x in (*(self.states[k][name] for name in self.names[k]), *maps)])

    def decoded(self, row: Tensor, k: int, flag: int) -> Carry | None:
        """Write the state of `row` in place, and return its carry."""
        state, maps = self._targets(k, flag)
        write_bits(row, (*state, *maps.values()))
        return Carry(**maps) if flag else None
