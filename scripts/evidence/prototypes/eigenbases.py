"""Eigenbases that follow their Gram matrices, renewed for many stacks together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from selective.preconditioner.fallbacks import Problem, solve_all, stand_in
from selective.preconditioner.linalg import finite, per_matrix
from selective.preconditioner.solvers import Solver, eigh


class Side(NamedTuple):
    """One side of a stack of which some bases are renewed."""

    gram: Tensor  # [count, n, n]
    basis: Tensor  # [count, n, n], written in place
    where: list[int]  # the matrices whose bases are renewed
    solver: Solver


def renew(sides: Sequence[Side]) -> None:
    """Renew the bases of all sides. Those of one size and solver are solved together.

    `solvers.cholesky` gives the basis that a QR of the power step gives, up to the signs of columns. Signs cancel: a
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
    largest = gram.diagonal(dim1=1, dim2=2).amax(1)  # no element of a Gram matrix is larger
    usable = finite(gram) & (largest > 0)
    solver = sides[0].solver
    return Problem(
        stand_in(gram / per_matrix(largest), usable),
        [old],
        usable,
        lambda matrix, bases: [solver(matrix, bases[0], False)],
        lambda matrix, bases: [eigh(matrix, bases[0], False)],
    )
