"""Eigenbases that follow their Gram matrices, renewed for many stacks together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from selective.preconditioner.fallbacks import Problem, solve_all
from selective.preconditioner.refresh import problems_of
from selective.preconditioner.shards import FromGrams
from selective.preconditioner.solvers import SolverName


class Side(NamedTuple):
    """One side of a stack of which some bases are renewed."""

    gram: Tensor  # [count, n, n]
    basis: Tensor  # [count, n, n], written in place
    where: list[int]  # the matrices whose bases are renewed
    solver: SolverName


def renew(sides: Sequence[Side]) -> None:
    """Renew the bases of all sides. Those of one size and solver are solved together.

    The solver "cholesky" gives the basis that a QR of the power step gives, up to the signs of columns. Signs cancel: a
    column of QL and its row of P change sign together, v has squares, and the product of the two has no sign. The host
    waits for the device once in a refresh, to learn if some matrix needs a fallback. A basis stays as it is if its Gram
    matrix is zero or not finite.
    """
    alike: dict[object, list[Side]] = {}
    for side in sides:
        alike.setdefault((side.gram.shape[1:], side.gram.dtype, side.gram.device, side.solver), []).append(side)
    if not alike:
        return
    bases, _ = solve_all([_problem(joined) for joined in alike.values()])
    for joined, (new,) in zip(alike.values(), bases, strict=True):
        parts = new.basis.split([len(side.where) for side in joined])
        for side, basis in zip(joined, parts, strict=True):
            side.basis[side.where] = basis.to(side.basis.dtype)


def _problem(sides: Sequence[Side]) -> Problem:
    gram = torch.cat([side.gram[side.where] for side in sides])
    old = torch.cat([side.basis[side.where] for side in sides])
    solver = sides[0].solver
    options = FromGrams(solver, carry="keep", floor=0.0)  # columns keep their places
    (problem,), _ = problems_of(options, solver, ("rows",), {"rows": old}, [{"rows_gram": gram}], [])
    return problem
