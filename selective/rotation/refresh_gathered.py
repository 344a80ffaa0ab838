"""Sharded matrices that are rotated on a side which is cut: gathered, rotated as on one device, cut up again.

A matrix is gathered by an all-reduce of zeros with each rank's part in its place. That sends twice what an all-gather
would, and needs to know nothing of how the others' parts lie: rows, columns, both, strided shards, replicas. Every rank
then makes the whole product and keeps its part, and the running averages are whole on each.

Note [gathered refresh]: what a refresh makes on one rank goes to all, as integers, with the maps for the moments. So
the ranks can't come to differ in a basis, as in Note [sharded refresh]. Before that goes a word for each matrix: which
maps there are, whether any part of its gradient was not finite, whether a rank has failed; then all raise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from selective.kernels import spec
from selective.preconditioner import Carry, Preconditioner, Shape, State
from selective.rotation.contract import check_refreshed, check_states
from selective.rotation.refresh_sharded import Sharded, cut_into_buckets, unread_gradient
from selective.sharding.collectives import bits_of, owners, sums, write_bits

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
    preconditioner: Preconditioner, due: Mapping[int, Sharded], missing: Mapping[int, Tensor],
    gradients: Callable[[list[int]], list[Tensor]],
) -> Iterator[dict[int, Carry | None]]:  # fmt: skip
    """New bases of these in their states, each made on one rank: lot by lot, the carries by index, alike on all ranks.

    `missing`: whether this rank's part of the gradient is not finite (0-d bool); then nothing is new anywhere.
    `gradients`: the wholes, asked for where the preconditioner reads them.
    """
    reads = preconditioner.refreshes_from_gradients()
    for group, indices in cut_into_buckets(due, lambda basis: basis.whole[1] * basis.whole[2] if reads else 0):
        bases = [due[i] for i in indices]
        grads = gradients(indices) if reads else [unread_gradient(basis, basis.whole) for basis in bases]
        solvers = owners([max(b.whole[1:]) for b in bases], torch.distributed.get_world_size(group))
        here = [k for k, owner in enumerate(solvers) if owner == torch.distributed.get_rank(group)]
        made = _Made(preconditioner, bases, grads, here)
        flags = torch.tensor([[flag, 0] for flag in made.flags], dtype=torch.int32, device="cpu").to(bases[0].device)
        flags[:, 1] = torch.stack([missing[i] for i in indices]).to(torch.int32)
        (both,) = sums([flags.view(-1)], group)
        said = both.view(-1, 2).tolist()  # waits for the device, as a refresh does
        if any(flag & FAILED for flag, _ in said):
            raise made.error or RuntimeError("it failed on another rank, whose error says how")
        rows = sums([made.row(k, flag) for k, (flag, _) in enumerate(said)], group)
        found: dict[int, Carry | None] = dict.fromkeys(indices)
        for k, (flag, spoilt) in enumerate(said):
            if not spoilt:
                found[indices[k]] = made.decoded(rows[k], k, flag)
        yield found


FAILED = 32  # in a flag; 1: there is a carry; 2, 4, 8, 16: it has this map
_FIELDS = ("left", "right", "rows", "columns")


class _Made:
    """What this rank has made of a lot, as the others get it."""

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
            for same in by_shape.values():
                self._solve(preconditioner, same, [grads[k] for k in same])
        except Exception as error:  # the others are waiting: they are told, and all raise
            self.error: Exception | None = error
            for k in here:
                self.flags[k] = FAILED

    def _solve(self, preconditioner: Preconditioner, same: list[int], grads: list[Tensor]) -> None:
        """Of copies, so that nothing has changed where an error or a gradient that is not finite undoes it."""
        states = []
        for k in same:
            state = self.bases[k].state
            states.append({**state, **{name: state[name].clone() for name in self.names[k]}})
        given = [dict(state) for state in states]
        clean = [grad.masked_fill(~grad.isfinite().all(), 0.0) for grad in grads]
        made = preconditioner.refresh(states, clean)
        check_refreshed(made, [self.bases[k].whole for k in same])
        check_states(given, states)
        for k, state, carry in zip(same, states, made, strict=True):
            self.states[k], self.carries[k] = state, carry
            if carry is not None:
                self.flags[k] = 1 + sum(2 << place for place, x in enumerate(carry) if x is not None)

    def _targets(self, k: int, flag: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The entries of a state that a refresh writes, and maps as this flag says, of the right sizes."""
        (_, m, n), device = self.bases[k].whole, self.bases[k].device
        sizes = {"left": (1, m, m), "right": (1, n, n), "rows": (1, m), "columns": (1, n)}
        kinds = {"left": torch.float32, "right": torch.float32, "rows": torch.int64, "columns": torch.int64}
        present = [name for place, name in enumerate(_FIELDS) if flag & (2 << place)]
        maps = {name: torch.zeros(sizes[name], dtype=kinds[name], device=device) for name in present}
        return [self.bases[k].state[name] for name in self.names[k]], maps

    def row(self, k: int, flag: int) -> Tensor:
        """int32, 1-d: what was made of one matrix here, or as many zeros."""
        device = self.bases[k].device
        if k not in self.states:
            state, maps = self._targets(k, flag)
            count = sum(x.numel() * x.element_size() // 4 for x in (*state, *maps.values()))
            return torch.zeros(count, dtype=torch.int32, device=device)
        carry = self.carries[k]
        maps = [] if carry is None else [x for x in carry if x is not None]
        return torch.cat([bits_of(x, device) for x in (*(self.states[k][name] for name in self.names[k]), *maps)])

    def decoded(self, row: Tensor, k: int, flag: int) -> Carry | None:
        """Write the state; the carry."""
        state, maps = self._targets(k, flag)
        write_bits(row, (*state, *maps.values()))
        return Carry(**maps) if flag else None
