"""Running Gram matrices of the gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from selective.preconditioner.base import State
from selective.preconditioner.linalg import REFRESHED, batches, per_matrix, stack
from selective.preconditioner.sides import Side, gram


def observe(sides: Sequence[Side], states: Sequence[State], grads: Sequence[Tensor], beta: float) -> None:
    """A ← β A + (1 − β) GGᵀ for each side, in place; nothing of a matrix where the result would not be finite."""
    if not sides or not grads[0].numel():
        return
    batch, rows, columns = grads[0].shape
    for some in batches(len(grads), batch * max(rows, columns) ** 2, REFRESHED):
        grad, group = stack(grads[some]), states[some]
        averages = {side: gram(grad, side).mul_(1 - beta) for side in sides}
        for side, average in averages.items():
            average.add_(stack([state[f"{side}_gram"] for state in group]), alpha=beta)
        good = torch.stack([_diagonal_is_finite(average) for average in averages.values()]).all(0)
        for side, average in averages.items():
            for state, new, ok in zip(group, average.split(batch), good.split(batch), strict=True):
                kept = state[f"{side}_gram"]
                kept.copy_(torch.where(per_matrix(ok), new, kept))
        for state, ok in zip(group, good.split(batch), strict=True):
            state["skipped"].add_((~ok).sum())


def _diagonal_is_finite(average: Tensor) -> Tensor:
    """Whether all of a positive semi-definite matrix is finite [batch]: no element exceeds the largest on the diagonal.

    Cauchy-Schwarz; and a NaN in a gradient's row or column is in that one's sum of squares.
    """
    return average.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
