"""Gram matrices of gradients, their running averages, and the choice of the sides that are rotated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from selective.kernels import average_grams_, float32_product, has_float32_products
from selective.preconditioner.base import Shape, Side, State
from selective.preconditioner.linalg import REFRESHED, add_to, batches, copy_to, float32_products, per_matrix, stack
from selective.preconditioner.proportion import Limits

Sides = Literal["one", "two", "rows", "columns", "unsharded"]


def rotated_sides(sides: Sides, shape: Shape, limits: Limits) -> tuple[Side, ...]:
    """Return the sides that are rotated, by the shape alone: those of `sides_asked_for` that the limits allow."""
    return tuple(side for side in sides_asked_for(sides, shape) if limits.allow(side, shape))


def sides_asked_for(sides: Sides, shape: Shape) -> tuple[Side, ...]:
    """Return the sides that `sides` names.

    Vectors and empty tensors have none. "one" is the smaller side, and the columns of a square matrix. "unsharded" is
    the columns if the matrix is not sharded: most are sharded by rows, and then x Q needs no communication
    (`shards.py`).
    """
    batch, rows, columns = shape
    if batch == 0 or min(rows, columns) < 2:
        return ()
    if sides == "one":
        sides = "rows" if rows < columns else "columns"
    wanted: dict[Sides, tuple[Side, ...]] = {
        "two": ("rows", "columns"),
        "rows": ("rows",),
        "columns": ("columns",),
        "unsharded": ("columns",),
    }
    return wanted[sides]


@float32_products()
def gram(grad: Tensor, side: Side) -> Tensor:
    """Return G Gᵀ for the rows, Gᵀ G for the columns, [batch, n, n] in the gradient's dtype."""
    x = grad if side == "rows" else grad.mT
    return float32_product(x, x.mT, symmetric=True)


def observe(sides: Sequence[Side], states: Sequence[State], grads: Sequence[Tensor], beta: float) -> None:
    """Update A ← β A + (1 − β) GGᵀ for each side, in place; a matrix stays as it is if the result is not finite."""
    batch, rows, columns = grads[0].shape
    if not sides or not batch:
        return
    for part in batches(len(grads), batch * max(rows, columns) ** 2, REFRESHED):
        grad, group = stack(grads[part]), states[part]
        old = {side: stack([state[f"{side}_gram"] for state in group]) for side in sides}
        new = {side: _averaged(old[side], grad, side, beta) for side in sides}
        is_finite = torch.stack([_diagonal_is_finite(average) for average in new.values()]).all(0)
        for side in sides:
            chosen = torch.where(per_matrix(is_finite), new[side], old[side])
            copy_to([state[f"{side}_gram"] for state in group], chosen.split(batch))
        add_to([state["skipped"] for state in group], (~is_finite).view(-1, batch).sum(1))


@float32_products()
def _averaged(old: Tensor, grad: Tensor, side: Side, beta: float) -> Tensor:
    x = grad if side == "rows" else grad.mT
    if not has_float32_products(x):
        return torch.baddbmm(old, x, x.mT, beta=beta, alpha=1 - beta)
    new, factors = old.clone(), torch.full((len(x),), beta, dtype=torch.float32, device=x.device)
    average_grams_(new, None, x, factors=factors, left_out=factors < 0, weight=1 - beta)
    return new


def _diagonal_is_finite(average: Tensor) -> Tensor:
    """Return bool [batch]: True where a positive semi-definite matrix is finite.

    It is enough to look at the diagonal. By the inequality of Cauchy and Schwarz no element exceeds the largest on the
    diagonal, and a NaN in a row or column of a gradient is in the diagonal's sum of squares.
    """
    return average.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
