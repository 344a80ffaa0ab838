"""The refresh of whole stacks: new bases for all parameters of one shape or several, with one wait for the device.

It computes what `refresh.py` computes for lists of states. All work is launched before the host looks at a result, and
nothing is written before all of it has succeeded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from selective.preconditioner.base import Carry, Side, State
from selective.preconditioner.fallbacks import NewBasis, Problem, solve_and_read
from selective.preconditioner.linalg import batches, per_matrix, refreshed_at_once
from selective.preconditioner.refresh import (
    Facts,
    Options,
    carries,
    faults,
    noise_of,
    problems_of,
    solver_for,
    turn,
)
from selective.preconditioner.shards import side_of

Result = TypeVar("Result")


class Due(NamedTuple):
    """Parameters of one shape whose bases are due: `state` has stacks [count * batch, ...], and counters [count].

    All are refreshed for the first time, or none.

    `grads` [count * batch, m, n] are zeros where they are not finite. They may be expanded zeros if nobody reads them.
    """

    count: int
    state: State
    grads: Tensor
    finite: Tensor  # bool [count]: True if the gradient is finite


class Renewed(NamedTuple):
    """The result for one stack: the maps for all of its matrices, and for which parameters they hold."""

    maps: Carry
    valid: Tensor | None  # bool [count]; None: for all


def refresh_stacks(options: Options, dues: Sequence[Due]) -> list[Renewed | None]:
    """Write new bases into the stacks, and return the maps from the old ones; None if no basis of a stack is new.

    A basis stays as it is, with all that belongs to it, if the gradient of its parameter is not finite.
    """
    work = [_Work(options, due) for due in dues]
    joined = _Joined([problem for each in work for problem in each.handed_over()])
    spoilt = ~torch.stack([due.finite.all() for due in dues]).all()

    def maps_of(bases: list[list[Tensor]]) -> list[dict[Side, Tensor]] | None:
        if options.carry == "keep":
            return None
        parts = iter(joined.apart(bases, lambda basis, part: basis[part]))
        return [each.maps_to([basis for _ in range(each.problem_count) for basis in next(parts)]) for each in work]

    solved = solve_and_read(joined.problems, spoilt, maps_of)
    results = iter(joined.apart(solved.bases, _part_of))
    writes: list[Callable[[], object]] = []
    renewed = []
    for each, maps in zip(work, solved.made or [None] * len(work), strict=True):
        bases = [basis for _ in range(each.problem_count) for basis in next(results)]
        renewed.append(each.finish(bases, solved.everything, maps, writes))
    for write in writes:  # nothing raises any more
        write()
    return renewed


class _Joined:
    """Problems of which those with matrices of one size, and one solver, are solved as one."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.sizes = [len(problem.matrix) for problem in problems]
        by_kind: dict[tuple[object, ...], list[int]] = {}
        for number, problem in enumerate(problems):
            alone = () if len(problem.old) == 1 else (number,)  # an SVD of the gradient gives the bases of both sides
            by_kind.setdefault((problem.matrix.shape[1:], problem.name, *alone), []).append(number)
        self.members: list[list[int]] = []
        for members in by_kind.values():
            numel = max(problems[members[0]].matrix[0].numel() * self.sizes[i] for i in members)
            limit = refreshed_at_once(problems[members[0]].matrix.device)
            self.members += [members[part] for part in batches(len(members), numel, limit)]
        self.problems = [_as_one([problems[i] for i in members]) for members in self.members]

    def apart(self, solved: Sequence[list[Result]], part_of: Callable[[Result, slice], Result]) -> list[list[Result]]:
        """Return the results of the problems, on each side of them, in their order.

        `part_of` cuts the results of some matrices out of those of all.
        """
        results: list[list[Result]] = [[]] * len(self.sizes)
        for members, sides in zip(self.members, solved, strict=True):
            start = 0
            for number in members:
                part = slice(start, start + self.sizes[number])
                results[number] = [part_of(side, part) for side in sides]
                start = part.stop
        return results


def _part_of(basis: NewBasis, part: slice) -> NewBasis:
    return NewBasis(*(None if x is None else x[part] for x in basis))  # type: ignore[arg-type]


def _as_one(problems: Sequence[Problem]) -> Problem:
    first = problems[0]
    if len(problems) == 1:
        return first
    return first._replace(
        matrix=torch.cat([problem.matrix for problem in problems]),
        old=[torch.cat([problem.old[0] for problem in problems])],
        usable=torch.cat([problem.usable for problem in problems]),
    )


class _Work:
    """The refresh of one stack."""

    def __init__(self, options: Options, due: Due) -> None:
        self.options, self.due = options, due
        sides = side_of(due.state)
        self.old: dict[Side, Tensor] = {side: due.state[f"{side}_basis"] for side in sides}
        self.batch = len(due.grads) // due.count
        solver = solver_for(options.solver, int(due.state["refreshes"][0]))
        self.problems, self.facts = problems_of(options, solver, sides, self.old, [due.state], [due.grads])
        self.problem_count = len(self.problems)

    def handed_over(self) -> list[Problem]:
        """Return the problems, and keep none of their matrices."""
        problems, self.problems = self.problems, []
        return problems

    def maps_to(self, bases: Sequence[Tensor]) -> dict[Side, Tensor]:
        """Return the maps to new bases of all matrices."""
        return {side: turn(basis, old, None) for (side, old), basis in zip(self.old.items(), bases, strict=True)}

    def finish(
        self,
        new: Sequence[NewBasis],
        everything: bool,
        turned: dict[Side, Tensor] | None,
        writes: list[Callable[[], object]],
    ) -> Renewed | None:
        """Append what has to be written, and return the maps.

        `everything`: each matrix has a new basis. Then `turned` may have the maps already.
        """
        due, state = self.due, self.due.state
        if not everything:
            new = [basis._replace(changed=basis.changed & self._by_matrix(due.finite)) for basis in new]
        bases = dict(zip(self.old, new, strict=True))
        changed, is_new = None, [True] * due.count
        if not everything:
            changed = torch.stack([basis.changed for basis in new]).any(0).view(due.count, -1).any(1)
            is_new = changed.tolist()
            for name, which in faults(new, self.facts).items():
                amounts = which.view(due.count, -1).sum(1) * due.finite
                writes.append(lambda name=name, amounts=amounts: state[name].add_(amounts))
        writes.append(lambda: state["refreshes"].add_(torch.tensor(is_new, dtype=torch.int64, device="cpu")))
        if "noise" in state:
            self._set_noise(next(iter(bases.values())), self.facts[0], writes)
        for side, basis in bases.items():
            chosen = basis.basis if everything else torch.where(per_matrix(basis.changed), basis.basis, self.old[side])
            writes.append(lambda side=side, chosen=chosen: state[f"{side}_basis"].copy_(chosen))
        (maps,) = carries(self.options, bases, self.old, [any(is_new)], len(due.grads), everything, turned)
        return None if maps is None else Renewed(maps, changed)

    def _set_noise(self, basis: NewBasis, facts: Facts, writes: list[Callable[[], object]]) -> None:
        old, noise = self.due.state["noise"], noise_of(facts, basis, self.options.floor)
        kept = torch.where(self._by_matrix(self.due.finite), noise, old)
        writes.append(lambda: old.copy_(kept))

    def _by_matrix(self, flags: Tensor) -> Tensor:
        """Return flags [count] as [count * batch]."""
        return flags if self.batch == 1 else flags.repeat_interleave(self.batch, output_size=len(self.due.grads))
