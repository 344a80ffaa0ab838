"""Bases that diagonalise a Gram matrix: eigenvectors from scratch, or one step on from the basis that there was.

A solver takes A [batch, n, n], symmetric, positive semi-definite and scaled so that its largest diagonal element is 1,
and the old basis; it returns columns in falling order of their eigenvalues (of the estimates of them from the old
basis, or, unsorted, in the order that there was). It works in the dtype that it is given.
`rescue.py` judges the results, so none of this looks at its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

SolverName = Literal["eigh", "svd", "qr", "cholesky"]

PASSES = 4
"""Of Cholesky QR. On gradients of a small GPT, ten steps after the basis before, two passes were not enough for half of
the matrices, three for one in ten (the first averages are of low rank), four for any, also from a foreign basis."""


class Solved(NamedTuple):
    """Columns [batch, n, n], estimates of their eigenvalues [batch, n], and which old column each was, if known."""

    basis: Tensor
    values: Tensor
    order: Tensor | None = None


Solver = Callable[[Tensor, Tensor, bool], Solved]  # A, the old basis, and whether columns may change places


def eigh(gram: Tensor, old: Tensor, sort: bool = True) -> Solved:
    values, vectors = torch.linalg.eigh(gram)
    return Solved(vectors.flip(-1), values.flip(-1))


def svd(gram: Tensor, old: Tensor, sort: bool = True) -> Solved:
    vectors, values, _ = torch.linalg.svd(gram)
    return Solved(vectors, values)


def singular_vectors(grad: Tensor, rows: bool, columns: bool) -> list[Solved]:
    """Of the gradient itself, for the sides that are asked for; squaring it into a Gram matrix loses the small ones."""
    need_full = (rows and grad.shape[-2] > grad.shape[-1]) or (columns and grad.shape[-1] > grad.shape[-2])
    u, values, vh = torch.linalg.svd(grad, full_matrices=need_full)
    squares = values.square()

    def of(basis: Tensor) -> Solved:  # the longer side's further columns have singular value 0
        more = basis.shape[-1] - squares.shape[-1]
        return Solved(basis, torch.nn.functional.pad(squares, (0, more)))

    return [of(side) for side, wanted in ((u, rows), (vh.mT, columns)) if wanted]


def qr(gram: Tensor, old: Tensor, sort: bool = True) -> Solved:
    """One power step and a QR decomposition (SOAP, arXiv 2409.11321, algorithm 4)."""
    moved, values, order = power_step(gram, old, sort)
    return Solved(torch.linalg.qr(moved).Q, values, order)


def cholesky(gram: Tensor, old: Tensor, sort: bool = True) -> Solved:
    """The same flag as `qr` spans, from products, Cholesky factors and triangular solves alone.

    Shifted Cholesky QR (Fukaya et al., arXiv 1809.11085): Y ← Y R⁻¹ with RᵀR = YᵀY + sI. The columns are scaled to
    length 1 before each pass, which changes no span and takes the spread of the eigenvalues out of the condition. The
    shift bounds the rounding of YᵀY: n·eps where all columns may be parallel, ‖YᵀY‖ = n, a tenth after the first pass.
    What the shift leaves, ‖QᵀQ − I‖ of its size, goes in the Newton-Schulz step that every solver's result gets.
    """
    moved, values, order = power_step(gram, old, sort)
    n = moved.shape[-1]
    for step in range(PASSES):
        moved = moved / moved.norm(dim=-2, keepdim=True)
        squared = moved.mT @ moved
        squared.diagonal(dim1=-2, dim2=-1).add_(n * torch.finfo(moved.dtype).eps * (1 if step == 0 else 0.1))
        lower, _ = torch.linalg.cholesky_ex(squared)  # unlike `cholesky` it does not wait for the device
        moved = torch.linalg.solve_triangular(lower.mT, moved, upper=True, left=False)
    return Solved(moved, values, order)


def power_step(gram: Tensor, old: Tensor, sort: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """A Q with the columns sorted by the eigenvalue qᵀAq, those estimates, and the order.

    A column is orthogonalised against those before it, so that the large ones should come first.

    A few eps of Q are added, as of a Gram matrix that much larger: its eigenvectors are the same, and a column in A's
    null space stays where it is instead of becoming the rounding errors of the product.
    """
    product = gram @ old
    values, moved = (product * old).sum(-2), product + 4 * torch.finfo(old.dtype).eps * old
    if not sort:
        return moved, values, None
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return torch.take_along_dim(moved, order[:, None, :], dim=-1), values, order


SOLVERS: dict[SolverName, Solver] = {"eigh": eigh, "svd": svd, "qr": qr, "cholesky": cholesky}
WARM: frozenset[SolverName] = frozenset({"qr", "cholesky"})
"""Solvers that go on from a basis; the first one is made by eigh."""
