"""The refresh of bases whose matrices are sharded: two collectives for all that are due, and none in other steps.

Note [sharded refresh]: parts of Gram matrices are added up over the ranks, with a flag for each matrix if any part of
its gradient was not finite. Then every matrix is solved on one rank; the largest are assigned first, each to the rank
with the least work so far. The new states of bases go to all ranks bit for bit: as integers, to which the other ranks
add zeros. So the bases cannot differ between ranks, even if a solver gives different results on them. The sizes of what
is sent follow from shapes and from the flags, which are the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from selective.kernels import spec
from selective.preconditioner import Carry, Preconditioner, Refreshed, Shape, State
from selective.sharding.collectives import SENT, all_reduced, bits_of, counts_in_sums, from_owners, owners, write_bits


class Sharded(Protocol):
    """The attributes of a `rotation.Basis` that a refresh reads."""

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
    """Refresh the bases in their states, and return the carries by index, in the same order on all ranks.

    `finite` is 0-d bool for each: True if this rank's part of the gradient is finite; None if nobody looked. `matrices`
    returns this rank's parts of gradients.
    """
    carries: dict[int, Carry | None] = {}
    for group, indices in cut_into_buckets(due):
        grads = {i: unread_gradient(due[i], due[i].shape) for i in indices}
        if preconditioner.refreshes_from_gradients():
            grads = dict(zip(indices, matrices(indices), strict=True))
        states = [due[i].state for i in indices]
        parts = preconditioner.refresh_parts(states, [grads[i] for i in indices])
        counted = [counts_in_sums(due[i].shard) for i in indices]
        missing = [_missing(finite[i], due[i].device) for i in indices]
        sums_and_flags = all_reduced(
            [torch.cat([p.reshape(-1), m]) for p, m in zip(parts, missing, strict=True)], counted, group
        )
        spoilt = torch.stack([row[-1] for row in sums_and_flags]).tolist()  # waits for the device, as a refresh does
        good = [k for k, flag in enumerate(spoilt) if not flag]
        wholes = [sums_and_flags[k][:-1].view(parts[k].shape) for k in good]
        good_carries = _solve_shared(preconditioner, [states[k] for k in good], wholes, group)
        carries.update(dict.fromkeys(indices))
        carries.update(zip([indices[k] for k in good], good_carries, strict=True))
    return carries


def cut_into_buckets(
    due: Mapping[int, Sharded], more: Callable[[Sharded], int] = lambda basis: 0
) -> Iterator[tuple[Any, list[int]]]:
    """Iterate over process groups and the indices of bases that are sent together: at most `SENT` elements at a time.

    All on one device. The sizes are the same on all ranks, and so are the buckets. `more` returns the number of
    elements that are sent of each basis besides its state.
    """
    by_group: dict[tuple[int, torch.device], list[int]] = {}
    for index, basis in due.items():
        assert basis.shard is not None
        by_group.setdefault((id(basis.shard.group), basis.device), []).append(index)
    for indices in by_group.values():
        bucket: list[int] = []
        count = 0
        for index in indices:
            size = sum(value.numel() for value in due[index].state.values()) + more(due[index])
            if bucket and count + size > SENT:
                yield _group(due[bucket[0]]), bucket
                bucket, count = [], 0
            bucket.append(index)
            count += size
        yield _group(due[bucket[0]]), bucket


def _group(basis: Sharded) -> Any:
    assert basis.shard is not None
    return basis.shard.group


def unread_gradient(basis: Sharded, shape: Shape) -> Tensor:
    """Return a gradient of zeros for a preconditioner that does not read it."""
    return torch.zeros((), dtype=torch.float32, device=basis.device).expand(shape)


def _missing(finite: Tensor | None, device: torch.device) -> Tensor:
    """Return a float32 tensor [1]: 1 if this part of the gradient is known not to be finite, else 0."""
    if finite is None:
        return torch.zeros(1, dtype=torch.float32, device=device)
    return (~finite).to(torch.float32).reshape(1)


def _solve_shared(
    preconditioner: Preconditioner, states: Sequence[State], wholes: Sequence[Tensor], group: Any
) -> list[Carry | None]:
    """Solve each matrix on one rank, and send its new state to all in one all-reduce; return the carries."""
    if not states:
        return []
    solvers = owners([whole.shape[-1] for whole in wholes], torch.distributed.get_world_size(group))
    here = [k for k, owner in enumerate(solvers) if owner == torch.distributed.get_rank(group)]
    names = [sorted(name for name in state if not preconditioner.is_part(name)) for state in states]
    old = [{name: state[name].clone() for name in replicated} for state, replicated in zip(states, names, strict=True)]
    written = [{**state, **{name: value.clone() for name, value in old[k].items()}} for k, state in enumerate(states)]
    solved = preconditioner.refresh_from([written[k] for k in here], [wholes[k] for k in here])
    rows = [_zeros(old[k], wholes[k]) for k in range(len(states))]
    for k, refreshed_here in zip(here, solved, strict=True):
        rows[k] = _encoded({name: written[k][name] for name in names[k]}, refreshed_here, wholes[k])
    rows = from_owners(rows, group)
    flags = torch.stack([row[-1] for row in rows]).tolist()
    refreshed = [
        _decoded(row, flag, {name: state[name] for name in replicated}, whole)
        for row, flag, state, replicated, whole in zip(rows, flags, states, names, wholes, strict=True)
    ]
    return preconditioner.carries_from(old, states, refreshed)


def _zeros(state: State, whole: Tensor) -> Tensor:
    count = sum(value.numel() * value.element_size() // 4 for value in state.values()) + _columns(whole) + 1
    return torch.zeros(count, dtype=torch.int32, device=whole.device)


def _columns(whole: Tensor) -> int:
    return whole.shape[0] * whole.shape[-1]


def _encoded(state: State, refreshed: Refreshed, whole: Tensor) -> Tensor:
    """Return state, order and a flag as 1-d int32.

    The flag is 0 if the basis is not new, 1 if it is new without an order, 2 if it is new with an order.
    """
    order = torch.zeros(_columns(whole), dtype=torch.int32, device=whole.device)
    if refreshed.order is not None:
        order = refreshed.order.to(torch.int32).reshape(-1)
    flag = order.new_full((1,), int(refreshed.new) + int(refreshed.new and refreshed.order is not None))
    return torch.cat([*(bits_of(value, whole.device) for value in state.values()), order, flag])


def _decoded(row: Tensor, flag: int, state: State, whole: Tensor) -> Refreshed:
    """Write the state of `row` in place, and return the rest of it as `Refreshed`."""
    start = write_bits(row, state.values())
    if flag < 2:
        return Refreshed(flag > 0)
    return Refreshed(True, row[start:-1].to(torch.int64).view(whole.shape[0], -1))
