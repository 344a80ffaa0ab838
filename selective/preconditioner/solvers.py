"""Solvers: bases that diagonalise a Gram matrix, from scratch or by one step from the old basis.

A solver takes A [batch, n, n], which is symmetric, positive semi-definite and scaled to a largest diagonal element of
1, and the old basis. It returns columns in falling order of their eigenvalues, or of the estimates of these from the
old basis. Without sorting, the columns stay at the places of the old ones. It computes in the dtype of its input. No
solver checks its own result: `fallbacks.py` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from selective.preconditioner.blocked import factor, lower_product, over, product, squared, times_lower
from selective.preconditioner.eigenvectors import eigenvectors
from selective.preconditioner.linalg import in_order

SolverName = Literal["eigh", "svd", "qr", "cholesky"]

SHIFT = 0.25
"""In units of √n · eps · ‖A‖ of float32: added to the diagonal of the small matrix before it is factored. It covers the
rounding errors of the float32 sums of A and of the products with it. For gradients of small GPTs and bases of ten steps
before, a fifth of it was enough for all of 206 matrices on a CPU, whose sums are two to four times as exact as a GPU's.
Ten times as much slowed convergence."""
SQUARED_SHIFT = 2.0
"""In units of eps: added to the diagonal of the root's product with itself. With it, ‖QᵀQ − I‖ was 5e-4 at most on
those gradients; with 12 it was five times as large. A result above 3e-3 is not trusted."""


class Solved(NamedTuple):
    """Columns [batch, n, n], estimates of their eigenvalues [batch, n], and if known the old column at each place."""

    basis: Tensor
    values: Tensor
    order: Tensor | None = None


Solver = Callable[[Tensor, Tensor, bool], Solved]  # takes A, the old basis, and True if columns may change places


def eigh(gram: Tensor, old: Tensor, sort: bool = True) -> Solved:
    """Return the eigenvectors by `linalg.eigh`; the old basis is not used."""
    values, vectors = eigenvectors(gram)
    return Solved(vectors.flip(-1), values.flip(-1))


def svd(gram: Tensor, old: Tensor, sort: bool = True) -> Solved:
    """Return the eigenvectors by `linalg.svd`; the old basis is not used."""
    vectors, values, _ = torch.linalg.svd(gram)
    return Solved(vectors, values)


def singular_vectors(grad: Tensor, rows: bool, columns: bool) -> list[Solved]:
    """Return the singular vectors of the gradient for the wanted sides.

    They are more exact than eigenvectors of its Gram matrix, in which small singular values are lost by squaring.
    """
    need_full = (rows and grad.shape[-2] > grad.shape[-1]) or (columns and grad.shape[-1] > grad.shape[-2])
    u, values, vh = torch.linalg.svd(grad, full_matrices=need_full)
    squares = values.square()

    def of(basis: Tensor) -> Solved:
        further = basis.shape[-1] - squares.shape[-1]  # columns of the longer side with singular value 0
        return Solved(basis, torch.nn.functional.pad(squares, (0, further)))

    return [of(side) for side, wanted in ((u, rows), (vh.mT, columns)) if wanted]


def qr(gram: Tensor, old: Tensor, sort: bool = True) -> Solved:
    """Take one power step and a QR decomposition (SOAP, arXiv 2409.11321, algorithm 4).

    Each column is orthogonalised against those before it. So columns with large eigenvalues come first, and without
    `sort` each is put back into its place afterwards.

    We add a few eps of Q to A Q, which is the power step of A + 4 eps I. Its eigenvectors are those of A, and a column
    in A's null space stays as it is instead of becoming the rounding errors of the product.
    """
    turned, values, order = _product(gram, old)
    moved = in_order(turned + 4 * torch.finfo(old.dtype).eps * old, order)
    return _placed(torch.linalg.qr(moved).Q, values, order, sort)


def cholesky(gram: Tensor, old: Tensor, sort: bool = True) -> Solved:
    """Compute the basis of `qr` with products, Cholesky factors and triangular solves alone.

    The first k columns span the same spaces, for all k. Since A Q = Q M with the small matrix M = QᵀAQ, the result is Q
    times the orthogonal factor W of M's QR decomposition. Let M = LLᵀ and LᵀL = KKᵀ. Then M² = L (LᵀL) Lᵀ = (L K)(L
    K)ᵀ, so that (L K)ᵀ is M's triangular factor, and W = M (L K)⁻ᵀ = L K⁻ᵀ. Cholesky QR (Fukaya et al., arXiv
    1809.11085) loses accuracy by squaring its matrix. Here only L is squared, the root of M. Its columns are scaled to
    length 1, which changes no span. If Q is nearly right and the large eigenvalues come first, the scaled L is nearly
    the identity, however far apart the eigenvalues are.

    `SHIFT` is added to M's diagonal, so that a column in A's null space stays as it is, and a few eps are added to that
    of LᵀL. The error ‖QᵀQ − I‖ is of the size of these shifts, and the Newton-Schulz step removes it that every
    solver's result gets. An earlier version took four shifted passes of Cholesky QR on A Q itself; it gave the same
    bases in three times the time.
    """
    shift = SHIFT * gram.shape[-1] ** 0.5 * torch.finfo(torch.float32).eps
    turned, values, order = _product(gram, old)
    old = in_order(old, order)
    small = lower_product(old, in_order(turned, order))
    del turned  # each of these is as large as the stack of Gram matrices
    small.diagonal(dim1=-2, dim2=-1).add_(shift * gram.flatten(1).norm(dim=1)[:, None])
    root = factor(small).lower
    del small
    root = root.div_(root.norm(dim=-2, keepdim=True))
    square = squared(root)
    square.diagonal(dim1=-2, dim2=-1).add_(SQUARED_SHIFT * torch.finfo(gram.dtype).eps)
    moved = times_lower(old, root)
    del old, root
    return _placed(over(moved, factor(square)), values, order, sort)


def _product(gram: Tensor, old: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return A Q, the estimates qᵀAq of the eigenvalues in falling order, and this order of the columns."""
    turned = product(gram, old)
    values, order = (turned * old).sum(-2).sort(dim=-1, descending=True, stable=True)
    return turned, values, order


def _placed(basis: Tensor, values: Tensor, order: Tensor, sort: bool) -> Solved:
    """Return the columns as they are, in falling order; without `sort`, put back into their old places."""
    if sort:
        return Solved(basis, values, order)
    back = order.argsort(dim=-1)
    return Solved(in_order(basis, back), values.gather(-1, back))


SOLVERS: dict[SolverName, Solver] = {"eigh": eigh, "svd": svd, "qr": qr, "cholesky": cholesky}
WARM: frozenset[SolverName] = frozenset({"qr", "cholesky"})
"""Solvers that start from the old basis; the first basis is made by eigh."""
