"""Running Gram matrices of the gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from selective.preconditioner.base import State
from selective.preconditioner.linalg import REFRESHED, add_to, batches, copy_to, float32_products, per_matrix, stack
from selective.preconditioner.sides import Side


def observe(sides: Sequence[Side], states: Sequence[State], grads: Sequence[Tensor], beta: float) -> None:
    """A ← β A + (1 − β) GGᵀ for each side, in place; nothing of a matrix where the result would not be finite."""
    batch, rows, columns = grads[0].shape
    if not sides or not batch:
        return
    for some in batches(len(grads), batch * max(rows, columns) ** 2, REFRESHED):
        grad, group = stack(grads[some]), states[some]
        old = {side: stack([state[f"{side}_gram"] for state in group]) for side in sides}
        new = {side: _averaged(old[side], grad, side, beta) for side in sides}
        good = torch.stack([_diagonal_is_finite(average) for average in new.values()]).all(0)
        for side in sides:
            chosen = torch.where(per_matrix(good), new[side], old[side])
            copy_to([state[f"{side}_gram"] for state in group], chosen.split(batch))
        add_to([state["skipped"] for state in group], (~good).view(-1, batch).sum(1))


@float32_products()
def _averaged(old: Tensor, grad: Tensor, side: Side, beta: float) -> Tensor:
    first, second = (grad, grad.mT) if side == "rows" else (grad.mT, grad)
    return torch.baddbmm(old, first, second, beta=beta, alpha=1 - beta)


def _diagonal_is_finite(average: Tensor) -> Tensor:
    """Whether all of a positive semi-definite matrix is finite [batch]: no element exceeds the largest on the diagonal.

    Cauchy-Schwarz; and a NaN in a gradient's row or column is in that one's sum of squares.
    """
    return average.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
