"""Solving with a way back: float32, then float64, then eigh in float64 on the CPU, then the old basis.

All work is launched before anything is looked at; then one small transfer tells the host whether any matrix needs more.
Only that, and what torch's eigh and svd do themselves, waits for the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from selective.preconditioner.linalg import align, float32_products, identity_like, in_order, per_matrix, settle
from selective.preconditioner.solvers import Solved


class Job(NamedTuple):
    """What has to be solved for some matrices, one result for each side in `old`."""

    matrix: Tensor  # [batch, ., .], finite
    old: list[Tensor]  # [batch, n, n] each
    usable: Tensor  # [batch]: False where the matrix only stands in for one that cannot be solved
    solve: Callable[[Tensor, list[Tensor]], list[Solved]]
    last: Callable[[Tensor, list[Tensor]], list[Solved]]


class Basis(NamedTuple):
    """One side's new basis: the old one's bits where nothing `changed`. The counts say what it took, [batch]."""

    basis: Tensor
    values: Tensor
    order: Tensor | None
    changed: Tensor
    float64: Tensor
    cpu: Tensor
    kept: Tensor


def solve_all(jobs: Sequence[Job]) -> tuple[list[list[Basis]], bool]:
    """The new bases of each job; and whether every matrix got one, which spares the host a look at each."""
    done = [_attempt(job, job.solve, torch.float32, job.matrix.device) for job in jobs]
    bad = [~_all_trusted(sides) for sides in done]
    flags = torch.stack([torch.stack((b & j.usable, ~j.usable)).any(1) for b, j in zip(bad, jobs, strict=True)])
    failed, unusable = flags.any(0).tolist()  # the one place that waits for the device
    results = []
    for job, sides in zip(jobs, done, strict=True):
        nothing = torch.zeros_like(job.usable)
        tries = _try_again(job, sides) if failed else (sides, nothing, nothing)
        results.append(_select(job, *tries, everything=not (failed or unusable)))
    if failed:
        _warn(sum(int(side.kept.sum()) for sides in results for side in sides))  # waits, as each further try has
    return results, not (failed or unusable)


def _warn(kept: int) -> None:
    """Python shows the same one once; each is counted."""
    if kept:
        warnings.warn(
            f"selective: {kept} bases were to be renewed and stay as they are: neither the solver in float32 and "
            f"float64 nor eigh on the CPU gave an orthogonal one. Training goes on; statistics() counts their matrices "
            f"as 'kept'",
            stacklevel=2,
        )


class _Try(NamedTuple):
    solved: Solved
    trusted: Tensor


def _attempt(job: Job, solve: Callable, dtype: torch.dtype, device: torch.device) -> list[_Try]:
    """One attempt at all matrices; if it raises, at each alone, so that one cannot spoil the others."""
    try:
        with float32_products():
            old = [basis.to(device, dtype) for basis in job.old]
            solved = solve(job.matrix.to(device, dtype), old)
    except torch.OutOfMemoryError:  # no matter of this matrix: smaller or more precise attempts won't help
        raise
    except RuntimeError:  # LinAlgError is one; so are the errors of the libraries underneath
        count = len(job.matrix)
        if count == 1:
            return [_Try(Solved(o, torch.zeros_like(o[:, 0])), torch.zeros_like(job.usable)) for o in job.old]
        alone = [_attempt(_part(job, torch.tensor([i], device="cpu")), solve, dtype, device) for i in range(count)]
        return [_joined(tries) for tries in zip(*alone, strict=True)]
    home = job.matrix.device
    tries = []
    for old, (basis, values, order) in zip(job.old, solved, strict=True):
        basis, trusted = settle(basis.to(home, torch.float32))
        order = None if order is None else order.to(home)
        values = values.to(home, torch.float32)
        tries.append(_Try(Solved(align(basis, _in_order(old, order)), values, order), trusted))
    return tries


def _try_again(job: Job, sides: list[_Try]) -> tuple[list[_Try], Tensor, Tensor]:
    """What failed once more in float64, what failed again on the CPU; and which [batch] got through where."""
    through = []
    for solve, device in ((job.solve, job.matrix.device), (job.last, torch.device("cpu"))):
        before = _all_trusted(sides)
        where = (job.usable & ~before).nonzero().flatten()
        if len(where):
            again = _attempt(_part(job, where), solve, torch.float64, device)
            sides = [_put(side, where, new) for side, new in zip(sides, again, strict=True)]
        through.append(_all_trusted(sides) & ~before & job.usable)
    return sides, through[0], through[1]


def _select(job: Job, sides: list[_Try], float64: Tensor, cpu: Tensor, *, everything: bool) -> list[Basis]:
    trusted = _all_trusted(sides)
    changed, kept = trusted & job.usable, job.usable & ~trusted
    found = []
    for old, ((basis, values, order), _) in zip(job.old, sides, strict=True):
        basis = basis if everything else torch.where(per_matrix(changed), basis, old)
        found.append(Basis(basis, values, order, changed, float64, cpu, kept))
    return found


def _all_trusted(sides: list[_Try]) -> Tensor:
    trusted = sides[0].trusted
    for side in sides[1:]:
        trusted = trusted & side.trusted
    return trusted


def _part(job: Job, where: Tensor) -> Job:
    where = where.to(job.matrix.device)
    return job._replace(matrix=job.matrix[where], old=[o[where] for o in job.old], usable=job.usable[where])


def _in_order(old: Tensor, order: Tensor | None) -> Tensor:
    return old if order is None else in_order(old, order)


def _orders(tries: Sequence[_Try]) -> list[Tensor] | None:
    """Of all, where one has an order: those without keep their places."""
    if all(t.solved.order is None for t in tries):
        return None
    places = [torch.arange(t.solved.basis.shape[-1], device=t.trusted.device).expand_as(t.solved.values) for t in tries]
    return [p if t.solved.order is None else t.solved.order for p, t in zip(places, tries, strict=True)]


def _joined(tries: Sequence[_Try]) -> _Try:
    orders = _orders(tries)
    order = None if orders is None else torch.cat(orders)
    basis, values = torch.cat([t.solved.basis for t in tries]), torch.cat([t.solved.values for t in tries])
    return _Try(Solved(basis, values, order), torch.cat([t.trusted for t in tries]))


def _put(side: _Try, where: Tensor, new: _Try) -> _Try:
    """`side` with the matrices at `where` replaced."""
    orders = _orders([side, new])

    def put(into: Tensor, values: Tensor) -> Tensor:
        return into.index_copy(0, where, values)

    order = None if orders is None else put(orders[0], orders[1])
    basis, values = put(side.solved.basis, new.solved.basis), put(side.solved.values, new.solved.values)
    return _Try(Solved(basis, values, order), put(side.trusted, new.trusted))


def stand_in(matrix: Tensor, usable: Tensor) -> Tensor:
    """The identity in place of what cannot be solved: nothing that is not finite reaches a solver."""
    return torch.where(per_matrix(usable), matrix, identity_like(matrix))
