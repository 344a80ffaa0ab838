"""The refresh of eigenbases: from Gram matrices to new bases, and to the maps that carry the moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from selective.preconditioner.blocked import product
from selective.preconditioner.data import Carry, State
from selective.preconditioner.fallbacks import NewBasis, Problem, solve_all, stand_in
from selective.preconditioner.gram import Side, gram
from selective.preconditioner.linalg import (
    REFRESHED,
    add_to,
    batches,
    copy_to,
    finite,
    float32_products,
    identity_like,
    per_matrix,
    stack,
)
from selective.preconditioner.solvers import SOLVERS, WARM, Solved, Solver, SolverName, eigh, singular_vectors

COUNTS = ("skipped", "float64", "cpu", "kept")
"""Names of counters in a state: of matrices whose input was not finite, that were solved in float64, that were solved
on the CPU, and whose old basis was kept."""


class Options(Protocol):
    """The options of an `Eigenbasis` that a refresh reads."""

    @property
    def solver(self) -> SolverName: ...
    @property
    def statistic(self) -> Literal["gradient", "ema"]: ...
    @property
    def carry(self) -> CarryName: ...
    @property
    def floor(self) -> float: ...


class Facts(NamedTuple):
    """The facts of matrices that a refresh needs after they were solved."""

    scale: Tensor  # [batch]; the gradient's σ₁ is scale · √(largest eigenvalue)
    finite: Tensor  # bool [batch]


class Input(NamedTuple):
    """The matrices that a side's solver gets, scaled to a largest element of 1."""

    matrix: Tensor
    usable: Tensor  # bool [batch]: True where the matrix is finite and not zero
    facts: Facts


def refresh(
    options: Options, sides: Sequence[Side], states: Sequence[State], grads: Sequence[Tensor]
) -> list[Carry | None]:
    """Write new bases into `states`, and return their carries. The first basis of a matrix is made by eigh."""
    carries: list[Carry | None] = [None] * len(states)
    if not sides or not grads[0].numel():
        return carries
    batch, rows, columns = grads[0].shape
    numel = batch * max({"rows": rows, "columns": columns}[side] for side in sides) ** 2
    if options.statistic == "gradient":
        numel = max(numel, batch * rows * columns)
    solvers = [solver_for(options.solver, int(state["refreshes"])) for state in states]
    for solver in SOLVERS:
        indices = [i for i, chosen in enumerate(solvers) if chosen == solver]
        for bucket in batches(len(indices), numel, REFRESHED):
            part = indices[bucket]
            part_carries = _refresh(options, solver, sides, [states[i] for i in part], [grads[i] for i in part])
            for i, carry in zip(part, part_carries, strict=True):
                carries[i] = carry
    return carries


def solver_for(solver: SolverName, refreshes: int) -> SolverName:
    """Return the solver of a basis that was refreshed so often: the first one is made by eigh."""
    return "eigh" if solver in WARM and not refreshes else solver


def _refresh(
    options: Options, solver: SolverName, sides: Sequence[Side], states: Sequence[State], grads: Sequence[Tensor]
) -> list[Carry | None]:
    old: dict[Side, Tensor] = {side: stack([state[f"{side}_basis"] for state in states]) for side in sides}
    problems, facts = problems_of(options, solver, sides, old, states, grads)
    solved, everything = solve_all(problems)
    bases: dict[Side, NewBasis] = dict(zip(sides, [basis for problem in solved for basis in problem], strict=True))
    batch = len(grads[0])
    if not everything:
        _count(states, batch, list(bases.values()), facts)
    if "noise" in states[0]:
        noise = noise_of(facts[0], next(iter(bases.values())), options.floor)
        copy_to([state["noise"] for state in states], noise.split(batch))
    changed = torch.stack([new_basis.changed for new_basis in bases.values()]).any(0)
    news = [True] * len(states) if everything else [bool(part.any()) for part in changed.split(batch)]
    for state, new in zip(states, news, strict=True):
        state["refreshes"].add_(int(new))
    maps = carries(options, bases, old, news, batch, everything)
    for side, new_basis in bases.items():  # last, because `old` may be a view of the bases in the states
        copy_to([state[f"{side}_basis"] for state in states], new_basis.basis.split(batch))
    return maps


def problems_of(
    options: Options,
    solver: SolverName,
    sides: Sequence[Side],
    old: dict[Side, Tensor],
    states: Sequence[State],
    grads: Sequence[Tensor],
) -> tuple[list[Problem], list[Facts]]:
    """Return a problem for each side, or one if the SVD of the gradient gives both; and the facts of their matrices."""
    if options.statistic == "gradient":
        grad = _scaled(stack(grads))
        if solver == "svd":
            vectors = partial(singular_vectors, rows="rows" in sides, columns="columns" in sides)
            last = partial(_by_grams, sides=sides)
            problem = Problem(grad.matrix, [old[s] for s in sides], grad.usable, lambda g, _: vectors(g), last)
            return [problem], [grad.facts]
        inputs = [_normalised(gram(grad.matrix, side), grad) for side in sides]
    else:
        inputs = [_normalised(stack([state[f"{side}_gram"] for state in states])) for side in sides]
    sort = options.carry != "keep"
    solve = partial(_one_side, SOLVERS[solver], sort)
    last = partial(_one_side, eigh, sort)
    problems = [Problem(i.matrix, [old[s]], i.usable, solve, last, solver) for i, s in zip(inputs, sides, strict=True)]
    return problems, [each.facts for each in inputs]


def _one_side(solver: Solver, sort: bool, matrix: Tensor, old: list[Tensor]) -> list[Solved]:
    return [solver(matrix, old[0], sort)]


def _by_grams(grad: Tensor, old: list[Tensor], sides: Sequence[Side]) -> list[Solved]:
    """Return singular vectors by eigh of the Gram matrices: the last fallback for an SVD."""
    return [eigh(gram(grad, side), basis) for side, basis in zip(sides, old, strict=True)]


def _scaled(grad: Tensor) -> Input:
    """Scale gradients to a largest element of 1, so that their squares neither overflow nor vanish."""
    is_finite = finite(grad)
    largest = grad.abs().amax((-2, -1))
    usable = is_finite & (largest > 0)
    scaled = stand_in(grad / per_matrix(largest), usable)
    return Input(scaled, usable, Facts(torch.where(usable, largest, 1.0), is_finite))


def _normalised(grams: Tensor, grad: Input | None = None) -> Input:
    """Scale Gram matrices to a largest element of 1, which is on the diagonal.

    `grad` are the scaled gradients that they were made of, if they are not running averages.
    """
    largest = grams.diagonal(dim1=-2, dim2=-1).amax(-1)
    is_finite = finite(grams) if grad is None else grad.facts.finite
    usable = (is_finite & (largest > 0)) if grad is None else grad.usable
    matrix = stand_in(grams / per_matrix(largest), usable)
    scale = torch.where(usable, largest, 1.0).sqrt() * (1.0 if grad is None else grad.facts.scale)
    return Input(matrix, usable, Facts(scale, is_finite))


def _count(states: Sequence[State], batch: int, bases: Sequence[NewBasis], facts: Sequence[Facts]) -> None:
    """Add to the counters of the states; a matrix counts once, even if several of its sides are concerned."""
    for name, which in faults(bases, facts).items():
        add_to([state[name] for state in states], which.view(-1, batch).sum(1))


def faults(bases: Sequence[NewBasis], facts: Sequence[Facts]) -> dict[str, Tensor]:
    """Return for each of `COUNTS` which matrices it concerns, on any of their sides: bool [batch]."""
    return {
        "skipped": torch.stack([~each.finite for each in facts]).any(0),
        "float64": torch.stack([b.float64 for b in bases]).any(0),
        "cpu": torch.stack([b.cpu for b in bases]).any(0),
        "kept": torch.stack([b.kept for b in bases]).any(0),
    }


def noise_of(facts: Facts, basis: NewBasis, floor: float) -> Tensor:
    """Return the size of rounding noise in rotated gradients, [batch]; 0 where the basis is not new."""
    largest = facts.scale * basis.values.amax(-1).clamp(min=0).sqrt()  # the gradient's σ₁
    return torch.where(basis.changed, floor * torch.finfo(torch.float32).eps * largest, 0.0)


def carries(
    options: Options,
    bases: dict[Side, NewBasis],
    old: dict[Side, Tensor],
    news: list[bool],
    batch: int,
    everything: bool,
    turned: Mapping[Side, Tensor] | None = None,
) -> list[Carry | None]:
    """Return the maps from the old bases to the new ones, for each `batch` of matrices; None where nothing is new.

    `everything` is True if each matrix has a new basis. Then `turned` may have the maps, as `turn` returns them.
    """
    if options.carry == "keep":
        return [Carry() if new else None for new in news]
    parts: dict[str, Sequence[Tensor | None]] = {}
    nothing: list[Tensor | None] = [None] * len(news)
    for side, new_basis in bases.items():
        if turned is None:
            map_ = turn(new_basis.basis, old[side], None if everything else new_basis.changed)
        else:
            map_ = turned[side]
        parts[side] = (map_ if side == "rows" else map_.mT).split(batch)
        if options.carry == "rotate":
            parts[f"{side}_order"] = order_of(new_basis.order, new_basis.changed, new_basis.basis).split(batch)
    columns = (parts.get(name, nothing) for name in ("rows", "columns", "rows_order", "columns_order"))
    return [Carry(*maps) if new else None for *maps, new in zip(*columns, news, strict=True)]


CarryName = Literal["squared", "rotate", "keep"]


@float32_products()
def turn(new: Tensor, old: Tensor, changed: Tensor | None) -> Tensor:
    """Return the map newᵀ old [batch, n, n], which takes coordinates in the old basis to those in the new one.

    Both bases are orthogonal, so that m = old m̃ = new (newᵀ old) m̃. Where `changed` (bool [batch]; None: everywhere)
    is False, the map is exactly the identity, so that moments keep their bits.
    """
    map_ = product(new.mT, old)
    return map_ if changed is None else torch.where(per_matrix(changed), map_, identity_like(map_))


def order_of(order: Tensor | None, changed: Tensor, basis: Tensor) -> Tensor:
    """Return the old column at each new place, [batch, n]: the same place if nothing changed or nothing was sorted."""
    places = torch.arange(basis.shape[-1], device=basis.device).expand(basis.shape[0], -1)
    return places if order is None else torch.where(changed[:, None], order, places)
