"""Norm control of lists of matrices, in plain torch.

Sums are in float64. Then a norm does not drift over the steps of a run, as their rounding, 1e-16, is far below that of
float32 weights, which is unbiased; and no square of a float32 number is too large or too small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..spec import Matrices

F64 = torch.float64
LEAST = 1e-70  # ‖d‖² up to which nothing has moved: float32 has no factor that would make a turn of it
MOST = 1e38  # the largest factor of d; float32 ends a little above it
NEAR = 1e-2  # the share of ‖W‖ up to which W' counts as 0, which has no direction
# The share of ‖W‖ up to which a difference of two parameters is rounding: a step that is masked out must not turn.
NOISE = {torch.float64: 2.0**-52}
FLOAT_NOISE = 2.0**-23
many: Any = torch  # the home of the multi-tensor functions, for which torch declares no types


@torch.no_grad()
def hold_matrices_(params: Sequence[Tensor], *, zero: bool) -> Tensor:
    """Arguments as for `selective.kernels.hold_matrices_`."""
    old = _stack(params)
    if zero:
        many._foreach_zero_(list(params))
    return old


@torch.no_grad()
def norm_sums(params: Sequence[Tensor], old: Tensor, *, matrices: Matrices, from_zero: bool) -> Tensor:
    """Arguments as for `selective.kernels.norm_sums`."""
    w, d = wide(old), _moved(params, old, from_zero)
    (w, dims), (d, _) = _as_matrices(w.double(), matrices), _as_matrices(d.double(), matrices)
    return torch.stack([(a * b).sum(dim=dims) for a, b in ((w, w), (w, d), (d, d))]).view(3, len(old), matrices.count)


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
    of_old, of_moved = factors(totals, rate, noise_of(old.dtype, from_zero))
    new = old.clone() if wide(old) is old else wide(old)
    (w, dims), (d, _) = _as_matrices(new, matrices), _as_matrices(_moved(params, old, from_zero), matrices)
    like = [1 if at in {dim % w.dim() for dim in dims} else size for at, size in enumerate(w.shape)]
    w.mul_(of_old.to(w.dtype).view(like)).addcmul_(d, of_moved.to(w.dtype).view(like))
    return new


def noise_of(dtype: torch.dtype, from_zero: bool) -> float:
    """The share of ‖W‖ up to which d is no movement. It is 0 for a step from 0, of which every digit is meant."""
    return 0.0 if from_zero else NOISE.get(dtype, FLOAT_NOISE)


def factors(totals: Tensor, rate: float | Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Return what W and d are multiplied by in the turned matrix, float64 [n, count] each.

    A matrix stays as it is if nothing has moved, and if W' would be next to 0, which only a rate near 1 can do.
    """
    square, product, length = totals
    still = (length <= LEAST) | (length <= noise**2 * square)  # False where there is a NaN, which goes on
    step = torch.where(still, 0.0, rate * (square / length).sqrt())
    after = square + 2 * step * product + step.square() * length
    still = still | (after <= NEAR**2 * square)
    shrink = (square / after).sqrt()
    still = still | (shrink * step >= MOST)
    return torch.where(still, 1.0, shrink), torch.where(still, 0.0, shrink * step)


def _stack(params: Sequence[Tensor]) -> Tensor:
    """The parameters one after the other, each in row-major order, whatever the order in its memory is."""
    return torch.stack([p.contiguous() for p in params])


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype of its arithmetic: float64 stays, everything else is float32."""
    return x if x.dtype == F64 else x.float()


def _moved(params: Sequence[Tensor], old: Tensor, from_zero: bool) -> Tensor:
    """d, what the step has added to the parameters."""
    now = wide(_stack(params))
    return now if from_zero else now.sub_(wide(old))


def _as_matrices(stack: Tensor, matrices: Matrices) -> tuple[Tensor, tuple[int, ...]]:
    """A view of a stack [n, *size], and the dimensions of it that one matrix extends over."""
    if matrices.beside == 1:
        return stack.view(len(stack), matrices.count, matrices.rows * matrices.columns), (2,)
    return stack.unflatten(-1, (matrices.beside, matrices.columns)), (-3, -1)
