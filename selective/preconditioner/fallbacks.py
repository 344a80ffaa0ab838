"""Solving with fallbacks: the solver in float32, then in float64, then eigh in float64 on the CPU, then the old basis.

All work is launched first. Then one small transfer tells the host if any matrix needs a fallback. Only this transfer
waits for the device, and torch's eigh and svd by themselves.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from selective.preconditioner.linalg import align, float32_products, identity_like, in_order, per_matrix, settle
from selective.preconditioner.solvers import Solved


class Problem(NamedTuple):
    """A stack of matrices to be solved, with one result for each side in `old`."""

    matrix: Tensor  # [batch, ., .], finite
    old: list[Tensor]  # [batch, n, n] each
    usable: Tensor  # bool [batch]: False where `matrix` is the identity in place of one that cannot be solved
    solve: Callable[[Tensor, list[Tensor]], list[Solved]]
    last: Callable[[Tensor, list[Tensor]], list[Solved]]  # the solver of the last fallback
    name: str = ""  # of the solver: problems of one name can be solved as one


class NewBasis(NamedTuple):
    """One side's new bases, with the fallbacks that they needed. All flags are bool [batch]."""

    basis: Tensor  # [batch, n, n]; the old basis, bit for bit, where `changed` is False
    values: Tensor  # [batch, n]
    order: Tensor | None  # int64 [batch, n], the old column at each new place
    changed: Tensor
    float64: Tensor  # True: solved in float64
    cpu: Tensor  # True: solved on the CPU
    kept: Tensor  # True: could not be solved


def solve_all(problems: Sequence[Problem]) -> tuple[list[list[NewBasis]], bool]:
    """Return the new bases of each problem, and True if every matrix got one: then the host need not check each."""
    solved = solve_and_read(problems, None, lambda _: None)
    return solved.bases, solved.everything


Made = TypeVar("Made")


@dataclass(frozen=True)
class SolvedAndRead(Generic[Made]):
    """The results of `solve_and_read`."""

    bases: list[list[NewBasis]]  # of each problem, on each of its sides
    everything: bool  # every matrix got a new basis, and the flag is False
    made: Made | None  # None unless `everything`


def solve_and_read(
    problems: Sequence[Problem], flag: Tensor | None, make: Callable[[list[list[Tensor]]], Made]
) -> SolvedAndRead[Made]:
    """Solve all problems, and make something of the new bases, with one wait for the device.

    `make` is called with the bases of each problem, on each of its sides, before the host knows if all of them can be
    trusted. A GPU does what it launches while the host waits and goes on. If not, or if `flag` is True, which is a 0-d
    bool on the device, what it has made is dropped before any matrix is solved again.
    """
    done = [_attempt(problem, problem.solve, torch.float32, problem.matrix.device) for problem in problems]
    usable = torch.cat([problem.usable for problem in problems])
    flags = torch.stack((usable & ~torch.cat([_all_trusted(sides) for sides in done]), ~usable)).any(1)
    reading = Reading(flags if flag is None else torch.cat((flags, flag.view(1))))
    made = make([[side.solved.basis for side in sides] for sides in done])
    failed, unusable, *flags_read = reading.wait()  # the one place that waits for the device
    everything = not (failed or unusable or any(flags_read))
    made = made if everything else None
    results = []
    for problem, sides in zip(problems, done, strict=True):
        nothing = torch.zeros_like(problem.usable)
        tries = _try_again(problem, sides) if failed else (sides, nothing, nothing)
        results.append(_select(problem, *tries, everything=not (failed or unusable)))
    if failed:
        _warn(sum(int(side.kept.sum()) for sides in results for side in sides))  # waits, as each further try has
    return SolvedAndRead(results, everything, made)


class Reading:
    """Values on their way to the host. It waits for what was launched before them, and for nothing after."""

    def __init__(self, values: Tensor) -> None:
        self.event: torch.cuda.Event | None = None
        if values.is_cuda:
            stream = torch.cuda.current_stream(values.device)  # the values need not be on the current device
            there = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            values = there.copy_(values, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record(stream)
        self.values = values

    def wait(self) -> list[bool]:
        if self.event is not None:
            self.event.synchronize()
        return self.values.tolist()


def _warn(kept: int) -> None:
    """Warn that bases are kept. Python shows an equal warning only once; `statistics()` counts all."""
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


def _attempt(problem: Problem, solve: Callable, dtype: torch.dtype, device: torch.device) -> list[_Try]:
    """Solve all matrices together; if that raises, one by one, so that a bad matrix does not affect the others."""
    try:
        with float32_products():
            old = [basis.to(device, dtype) for basis in problem.old]
            solved = solve(problem.matrix.to(device, dtype), old)
    except torch.OutOfMemoryError:  # a fallback needs no less memory
        raise
    except RuntimeError:  # LinAlgError is a RuntimeError, and so are errors of the linear algebra libraries
        count = len(problem.matrix)
        if count == 1:
            return [_Try(Solved(o, torch.zeros_like(o[:, 0])), torch.zeros_like(problem.usable)) for o in problem.old]
        alone = [_attempt(_part(problem, torch.tensor([i], device="cpu")), solve, dtype, device) for i in range(count)]
        return [_joined(tries) for tries in zip(*alone, strict=True)]
    home = problem.matrix.device
    tries = []
    for old, (basis, values, order) in zip(problem.old, solved, strict=True):
        basis, trusted = settle(basis.to(home, torch.float32))
        order = None if order is None else order.to(home)
        values = values.to(home, torch.float32)
        tries.append(_Try(Solved(align(basis, _in_order(old, order)), values, order), trusted))
    return tries


def _try_again(problem: Problem, sides: list[_Try]) -> tuple[list[_Try], Tensor, Tensor]:
    """Solve failed matrices in float64, and those that fail again on the CPU.

    Return the results, and bool [batch] twice: True where float64 helped, True where the CPU helped.
    """
    helped = []
    for solve, device in ((problem.solve, problem.matrix.device), (problem.last, torch.device("cpu"))):
        before = _all_trusted(sides)
        where = (problem.usable & ~before).nonzero().flatten()
        if len(where):
            again = _attempt(_part(problem, where), solve, torch.float64, device)
            sides = [_put(side, where, new) for side, new in zip(sides, again, strict=True)]
        helped.append(_all_trusted(sides) & ~before & problem.usable)
    return sides, helped[0], helped[1]


def _select(problem: Problem, sides: list[_Try], float64: Tensor, cpu: Tensor, *, everything: bool) -> list[NewBasis]:
    changed, kept = _all_trusted(sides), float64
    if not everything:  # else all are trusted and usable, and no flag of a fallback is set
        changed, kept = changed & problem.usable, problem.usable & ~changed
    bases = []
    for old, ((basis, values, order), _) in zip(problem.old, sides, strict=True):
        basis = basis if everything else torch.where(per_matrix(changed), basis, old)
        bases.append(NewBasis(basis, values, order, changed, float64, cpu, kept))
    return bases


def _all_trusted(sides: list[_Try]) -> Tensor:
    trusted = sides[0].trusted
    for side in sides[1:]:
        trusted = trusted & side.trusted
    return trusted


def _part(problem: Problem, where: Tensor) -> Problem:
    where = where.to(problem.matrix.device)
    return problem._replace(
        matrix=problem.matrix[where], old=[o[where] for o in problem.old], usable=problem.usable[where]
    )


def _in_order(old: Tensor, order: Tensor | None) -> Tensor:
    return old if order is None else in_order(old, order)


def _orders(tries: Sequence[_Try]) -> list[Tensor] | None:
    """Return the orders of all tries, where columns without an order stay at their places; None if no try has one."""
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
    """Return `side` with the results at `where` replaced by `new`."""
    orders = _orders([side, new])

    def put(into: Tensor, values: Tensor) -> Tensor:
        return into.index_copy(0, where, values)

    order = None if orders is None else put(orders[0], orders[1])
    basis, values = put(side.solved.basis, new.solved.basis), put(side.solved.values, new.solved.values)
    return _Try(Solved(basis, values, order), put(side.trusted, new.trusted))


def stand_in(matrix: Tensor, usable: Tensor) -> Tensor:
    """Replace matrices that are not usable by the identity, so that no NaN or infinity reaches a solver."""
    if not usable.is_cuda and usable.all():  # for a GPU the host would wait
        return matrix
    return torch.where(per_matrix(usable), matrix, identity_like(matrix))
