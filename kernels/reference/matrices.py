"""Norm control of lists of matrices, in plain torch.

Sums are in float64, so that a norm does not drift over the steps of a run: their rounding, 1e-16, is far below that of
float32 weights, which is unbiased.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..spec import Matrices

LEAST = 1e-12  # the least norm that is divided by
F64 = torch.float64
many: Any = torch  # the home of the multi-tensor functions, for which torch declares no types


@torch.no_grad()
def hold_matrices_(params: Sequence[Tensor], *, zero: bool) -> Tensor:
    """Arguments as for `selective.kernels.hold_matrices_`."""
    old = torch.stack(list(params))
    if zero:
        many._foreach_zero_(list(params))
    return old


@torch.no_grad()
def norm_sums(params: Sequence[Tensor], old: Tensor, *, matrices: Matrices, from_zero: bool) -> Tensor:
    """Arguments as for `selective.kernels.norm_sums`."""
    w, d = wide(old), _moved(params, old, from_zero)
    (w, dims), (d, _) = _as_matrices(w, matrices), _as_matrices(d, matrices)
    squares = [torch.linalg.vector_norm(x, dim=dims, dtype=F64).square() for x in (w, d)]
    return torch.stack([squares[0], (w * d).sum(dim=dims, dtype=F64), squares[1]]).view(3, len(old), matrices.count)


@torch.no_grad()
def turn_matrices_(
    params: Sequence[Tensor],
    old: Tensor,
    totals: Tensor,
    *,
    matrices: Matrices,
    from_zero: bool,
    rate: float | Tensor,
) -> None:
    """Arguments as for `selective.kernels.turn_matrices_`."""
    new = turned_matrices(params, old, totals, matrices=matrices, from_zero=from_zero, rate=rate)
    many._foreach_copy_(list(params), list(new.unbind()))


@torch.no_grad()
def turned_matrices(
    params: Sequence[Tensor],
    old: Tensor,
    totals: Tensor,
    *,
    matrices: Matrices,
    from_zero: bool,
    rate: float | Tensor,
) -> Tensor:
    """Return what `turn_matrices_` writes, before it is rounded: float32 or float64 [n, *size]."""
    of_old, of_moved = factors(totals, rate)
    new = old.clone() if wide(old) is old else wide(old)
    (w, dims), (d, _) = _as_matrices(new, matrices), _as_matrices(_moved(params, old, from_zero), matrices)
    like = [1 if at in {dim % w.dim() for dim in dims} else size for at, size in enumerate(w.shape)]
    w.mul_(of_old.to(w.dtype).view(like)).addcmul_(d, of_moved.to(w.dtype).view(like))
    return new


def factors(totals: Tensor, rate: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return what W and d are multiplied by in the turned matrix, float64 [n, count] each."""
    square, product, length = totals
    step = rate * square.sqrt() / length.sqrt().clamp_min(LEAST)
    after = (square + 2 * step * product + step.square() * length).clamp_min(0).sqrt()
    shrink = square.sqrt() / after.clamp_min(LEAST)
    return shrink, shrink * step


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype of its arithmetic: float64 stays, everything else is float32."""
    return x if x.dtype == F64 else x.float()


def _moved(params: Sequence[Tensor], old: Tensor, from_zero: bool) -> Tensor:
    """d, what the step has added to the parameters."""
    now = wide(torch.stack(list(params)))
    return now if from_zero else now.sub_(wide(old))


def _as_matrices(stack: Tensor, matrices: Matrices) -> tuple[Tensor, tuple[int, ...]]:
    """A view of a stack [n, *size], and the dimensions of it that one matrix extends over."""
    if matrices.beside == 1:
        return stack.view(len(stack), matrices.count, matrices.rows * matrices.columns), (2,)
    return stack.unflatten(-1, (matrices.beside, matrices.columns)), (-3, -1)
