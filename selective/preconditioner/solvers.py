"""Bases that diagonalise a Gram matrix: eigenvectors from scratch, or one step on from the basis that there was.

A solver takes A [batch, n, n], symmetric, positive semi-definite and scaled so that its largest diagonal element is 1,
and the old basis; it returns columns in falling order of their eigenvalues (of the estimates of them from the old
basis, or, unsorted, in the places that there were). It works in the dtype that it is given.
`rescue.py` judges the results, so none of this looks at its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from selective.preconditioner.blocked import factor, lower_product, over, squared, times_lower
from selective.preconditioner.linalg import in_order

SolverName = Literal["eigh", "svd", "qr", "cholesky"]

SHIFT = 0.25
"""√n · eps · ‖A‖ of float32, added to the diagonal of the small matrix before it is factored: what the float32 sums
that A came from, and the products with it, may have got wrong. On gradients of small GPTs, ten steps after the basis
before, a fifth of it was enough for all of 206 matrices on a CPU, whose sums are two to four times as exact as a
GPU's; ten times as much cost convergence."""
SQUARED_SHIFT = 2.0
"""eps, added to the diagonal of the root's product with itself. What it leaves of ‖QᵀQ − I‖ was 5e-4 at most on those
gradients, five times that with 12 in its place; 3e-3 is where a result is not trusted any more."""


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
    """One power step and a QR decomposition (SOAP, arXiv 2409.11321, algorithm 4).

    A column is orthogonalised against those before it, so that the large ones come first; without `sort` each is put
    back into its place afterwards.

    A few eps of Q are added to A Q, as of a Gram matrix that much larger: its eigenvectors are the same, and a column
    in A's null space stays where it is instead of becoming the rounding errors of the product.
    """
    product, values, order = _product(gram, old)
    moved = in_order(product + 4 * torch.finfo(old.dtype).eps * old, order)
    return _placed(torch.linalg.qr(moved).Q, values, order, sort)


def cholesky(gram: Tensor, old: Tensor, sort: bool = True) -> Solved:
    """The same flag as `qr` spans, from products, Cholesky factors and triangular solves alone.

    A Q = Q M with the small matrix M = QᵀAQ, so that Q times M's orthogonal factor W is what is looked for. With
    M = LLᵀ and LᵀL = KKᵀ that is W = L K⁻ᵀ: M² = L (LᵀL) Lᵀ = (L K)(L K)ᵀ, so (L K)ᵀ is M's triangular factor, and
    M (L K)⁻ᵀ = L K⁻ᵀ. So the squaring that spoils Cholesky QR (Fukaya et al., arXiv 1809.11085) is of L, the root of
    M: where Q is nearly right and the large eigenvalues come first, L with its columns scaled to length 1, which
    changes no span, is nearly the identity, however far apart the eigenvalues are.

    M's diagonal gets `SHIFT`, which leaves a column in A's null space where it is, LᵀL's a few eps. What those leave,
    ‖QᵀQ − I‖ of their size, goes in the Newton-Schulz step that every solver's result gets. Four shifted passes of
    Cholesky QR on A Q itself, which were here before, gave the same bases for three times the time.
    """
    wrong = SHIFT * gram.shape[-1] ** 0.5 * torch.finfo(torch.float32).eps
    product, values, order = _product(gram, old)
    old = in_order(old, order)
    small = lower_product(old, in_order(product, order))
    small.diagonal(dim1=-2, dim2=-1).add_(wrong * gram.flatten(1).norm(dim=1)[:, None])
    root = factor(small).lower
    root = root / root.norm(dim=-2, keepdim=True)
    whole = squared(root)
    whole.diagonal(dim1=-2, dim2=-1).add_(SQUARED_SHIFT * torch.finfo(gram.dtype).eps)
    return _placed(over(times_lower(old, root), factor(whole)), values, order, sort)


def _product(gram: Tensor, old: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A Q, the estimates qᵀAq of the eigenvalues in falling order, and that order."""
    product = gram @ old
    values, order = (product * old).sum(-2).sort(dim=-1, descending=True, stable=True)
    return product, values, order


def _placed(basis: Tensor, values: Tensor, order: Tensor, sort: bool) -> Solved:
    """In falling order of the eigenvalues, or put back into the places of before."""
    if sort:
        return Solved(basis, values, order)
    back = order.argsort(dim=-1)
    return Solved(in_order(basis, back), values.gather(-1, back))


SOLVERS: dict[SolverName, Solver] = {"eigh": eigh, "svd": svd, "qr": qr, "cholesky": cholesky}
WARM: frozenset[SolverName] = frozenset({"qr", "cholesky"})
"""Solvers that go on from a basis; the first one is made by eigh."""
