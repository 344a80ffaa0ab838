"""Norm control of lists of matrices on a CPU: the reference's results, over chunks that stay in the cache.

Chunks are added up in float32 by BLAS, and these sums in float64. A step reads and writes ten times the bytes of the
parameters, and makes no temporary of their size but the copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..reference.matrices import F64, factors, noise_of
from ..spec import Matrices

CHUNK = 2**15  # elements: two of float32 are 256 KiB
SMALL = 1e-30  # in float32, squares of the elements of a smaller sum may have lost digits
_PLAIN = (Tensor, torch.nn.Parameter)


def takes(params: Sequence[Tensor], matrices: Matrices | None) -> bool:
    """True for contiguous float32 and float64 tensors whose matrices are stretches of memory."""
    if matrices is not None and matrices.beside != 1:
        return False
    return all(
        type(p) in _PLAIN and p.device.type == "cpu" and p.dtype in (torch.float32, F64) and p.is_contiguous()
        for p in params
    )


@torch.no_grad()
def hold_matrices_(params: Sequence[Tensor], *, zero: bool) -> Tensor:
    """See `selective.kernels.hold_matrices_`."""
    old = torch.empty((len(params), *params[0].shape), dtype=params[0].dtype)
    for row, p in zip(old, params, strict=True):
        row.copy_(p)
    if zero:
        for p in params:
            p.zero_()
    return old


@torch.no_grad()
def norm_sums(params: Sequence[Tensor], old: Tensor, *, matrices: Matrices, from_zero: bool) -> Tensor:
    """See `selective.kernels.norm_sums`."""
    found = []
    for w, now in _pairs(params, old, matrices):
        sums = [0.0, 0.0, 0.0]
        for before, after in zip(w.split(CHUNK), now.split(CHUNK), strict=True):
            d = after if from_zero else after - before
            for place, (a, b) in enumerate(((before, before), (before, d), (d, d))):
                sums[place] += _dot(a, b)
        found.append(sums)
    return torch.tensor(found, dtype=F64, device="cpu").T.reshape(3, len(params), matrices.count)


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
    """See `selective.kernels.turn_matrices_`."""
    both = factors(totals, rate, noise_of(old.dtype, from_zero))
    of_old, of_moved = (factor.flatten().tolist() for factor in both)
    for (w, now), a, b in zip(_pairs(params, old, matrices), of_old, of_moved, strict=True):
        for before, after in zip(w.split(CHUNK), now.split(CHUNK), strict=True):
            d = after if from_zero else after.sub_(before)
            d.mul_(b).add_(before, alpha=a)


def _dot(a: Tensor, b: Tensor) -> float:
    """The product of two vectors. Squares that float32 can't hold are added up in float64."""
    found = torch.dot(a, b).item()
    if SMALL < abs(found) < math.inf:
        return found
    return torch.dot(a.double(), b.double()).item()


def _pairs(params: Sequence[Tensor], old: Tensor, matrices: Matrices) -> Iterator[tuple[Tensor, Tensor]]:
    """Each matrix before and after the step, as 1-d views."""
    for row, p in zip(old, params, strict=True):
        yield from zip(row.view(matrices.count, -1), p.detach().view(matrices.count, -1), strict=True)
