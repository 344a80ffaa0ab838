"""A refresh of bases whose matrices are sharded: two collectives for all that are due, and nothing in other steps.

Note [sharded refresh]: parts of Gram matrices are added up over the ranks, with a flag for each matrix that says
whether any part of its gradient was not finite. Then every matrix is solved on one rank, the largest first and each on
the one that has least to do so far; and what that has written, all states of bases, goes to all ranks bit for bit: as
integers, to which the others add zeros. So the ranks can't come to differ in a basis, whatever a solver does on each of
them. How much there is to send follows from shapes, and from the flags, which all have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from selective.kernels import spec
from selective.preconditioner import Carry, Preconditioner, Refreshed, Shape, State
from selective.sharding.collectives import SENT, all_reduced, bits_of, counts_in_sums, owners, sums, write_bits


class Sharded(Protocol):
    """What is looked at of a `rotation.Basis`."""

    @property
    def shape(self) -> Shape: ...
    @property
    def whole(self) -> Shape: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def state(self) -> State: ...
    @property
    def shard(self) -> spec.Shard | None: ...


def refresh_shards(
    preconditioner: Preconditioner,
    due: Mapping[int, Sharded],
    finite: Mapping[int, Tensor | None],
    matrices: Callable[[list[int]], list[Tensor]],
) -> dict[int, Carry | None]:
    """New bases of these in their states; the carries by index, in the same order on all ranks.

    `finite`: whether the parts of the gradients that are here are, where they were looked at. `matrices`: the parts.
    """
    found: dict[int, Carry | None] = {}
    for group, indices in cut_into_buckets(due):
        grads = {i: unread_gradient(due[i], due[i].shape) for i in indices}
        if preconditioner.refreshes_from_gradients():
            grads = dict(zip(indices, matrices(indices), strict=True))
        states = [due[i].state for i in indices]
        parts = preconditioner.refresh_parts(states, [grads[i] for i in indices])
        counted = [counts_in_sums(due[i].shard) for i in indices]
        missing = [_missing(finite[i], due[i].device) for i in indices]
        sums = all_reduced([torch.cat([p.reshape(-1), m]) for p, m in zip(parts, missing, strict=True)], counted, group)
        spoilt = torch.stack([one[-1] for one in sums]).tolist()  # waits for the device, as a refresh does
        good = [k for k, flag in enumerate(spoilt) if not flag]
        wholes = [sums[k][:-1].view(parts[k].shape) for k in good]
        made = _shared_out(preconditioner, [states[k] for k in good], wholes, group)
        found.update(dict.fromkeys(indices))
        found.update(zip([indices[k] for k in good], made, strict=True))
    return found


def cut_into_buckets(
    due: Mapping[int, Sharded], more: Callable[[Sharded], int] = lambda basis: 0
) -> Iterator[tuple[Any, list[int]]]:
    """Those of one group of processes and device, as many as are sent at once: cut by what all ranks know.

    `more`: elements that are needed of each besides its state.
    """
    alike: dict[tuple[int, torch.device], list[int]] = {}
    for index, basis in due.items():
        assert basis.shard is not None
        alike.setdefault((id(basis.shard.group), basis.device), []).append(index)
    for indices in alike.values():
        some: list[int] = []
        count = 0
        for index in indices:
            size = sum(value.numel() for value in due[index].state.values()) + more(due[index])
            if some and count + size > SENT:
                yield _group(due[some[0]]), some
                some, count = [], 0
            some.append(index)
            count += size
        yield _group(due[some[0]]), some


def _group(basis: Sharded) -> Any:
    assert basis.shard is not None
    return basis.shard.group


def unread_gradient(basis: Sharded, shape: Shape) -> Tensor:
    """A gradient that nobody reads."""
    return torch.zeros((), dtype=torch.float32, device=basis.device).expand(shape)


def _missing(finite: Tensor | None, device: torch.device) -> Tensor:
    """[1]: 1 where this part of the gradient is known not to be finite."""
    if finite is None:
        return torch.zeros(1, dtype=torch.float32, device=device)
    return (~finite).to(torch.float32).reshape(1)


def _shared_out(
    preconditioner: Preconditioner, states: Sequence[State], wholes: Sequence[Tensor], group: Any
) -> list[Carry | None]:
    """Solve each on one rank, give all of them its new state: one all-reduce."""
    if not states:
        return []
    solvers = owners([whole.shape[-1] for whole in wholes], torch.distributed.get_world_size(group))
    mine = [k for k, owner in enumerate(solvers) if owner == torch.distributed.get_rank(group)]
    names = [sorted(name for name in state if not preconditioner.is_part(name)) for state in states]
    old = [{name: state[name].clone() for name in kept} for state, kept in zip(states, names, strict=True)]
    written = [{**state, **{name: value.clone() for name, value in old[k].items()}} for k, state in enumerate(states)]
    solved = preconditioner.refresh_from([written[k] for k in mine], [wholes[k] for k in mine])
    rows = [_zeros(old[k], wholes[k]) for k in range(len(states))]
    for k, one in zip(mine, solved, strict=True):
        rows[k] = _encoded({name: written[k][name] for name in names[k]}, one, wholes[k])
    rows = sums(rows, group)
    flags = torch.stack([row[-1] for row in rows]).tolist()
    refreshed = [
        _decoded(row, flag, {name: state[name] for name in kept}, whole)
        for row, flag, state, kept, whole in zip(rows, flags, states, names, wholes, strict=True)
    ]
    return preconditioner.carries_from(old, states, refreshed)


def _zeros(state: State, whole: Tensor) -> Tensor:
    count = sum(value.numel() * value.element_size() // 4 for value in state.values()) + _columns(whole) + 1
    return torch.zeros(count, dtype=torch.int32, device=whole.device)


def _columns(whole: Tensor) -> int:
    return whole.shape[0] * whole.shape[-1]


def _encoded(state: State, refreshed: Refreshed, whole: Tensor) -> Tensor:
    """The state, the order, and 0 where nothing is new, 1 without an order, 2 with one."""
    order = torch.zeros(_columns(whole), dtype=torch.int32, device=whole.device)
    if refreshed.order is not None:
        order = refreshed.order.to(torch.int32).reshape(-1)
    flag = order.new_full((1,), int(refreshed.new) + int(refreshed.new and refreshed.order is not None))
    return torch.cat([*(bits_of(value, whole.device) for value in state.values()), order, flag])


def _decoded(row: Tensor, flag: int, state: State, whole: Tensor) -> Refreshed:
    """Write the state; what became of the matrix."""
    start = write_bits(row, state.values())
    if flag < 2:
        return Refreshed(flag > 0)
    return Refreshed(True, row[start:-1].to(torch.int64).view(whole.shape[0], -1))
