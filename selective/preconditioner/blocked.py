"""Symmetric products and Cholesky factors made block by block, so that what is known is not computed.

A product that is symmetric, or of triangular factors, costs a general one half or more of its time in vain, and
factoring a stack of large matrices is slow: on an H100 `linalg.cholesky_ex` reaches 6 of the 50 TFLOP/s that products
have. Blocks of `BLOCK` rows leave nearly everything to products; matrices of less than two blocks go to torch as they
are. All functions take and return [batch, ., .].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 512  # rows


def _blocks(n: int) -> Iterator[slice]:
    size = BLOCK if n >= 2 * BLOCK else max(n, 1)
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def lower_product(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b on and below the diagonal; above, only what is in a block with it."""
    n = a.shape[-1]
    if n < 2 * BLOCK:
        return a.mT @ b
    result = a.new_empty(len(a), n, n)
    for rows in _blocks(n):
        torch.bmm(a[:, :, rows].mT, b[:, :, : rows.stop], out=result[:, rows, : rows.stop])
    return result


def squared(root: Tensor) -> Tensor:
    """rootᵀ root of lower triangular ones, on and below the diagonal, as in `lower_product`."""
    n = root.shape[-1]
    if n < 2 * BLOCK:
        return root.mT @ root
    result = torch.empty_like(root)
    for rows in _blocks(n):
        below = root[:, rows.start :]
        torch.bmm(below[:, :, rows].mT, below[:, :, : rows.stop], out=result[:, rows, : rows.stop])
    return result


def times_lower(x: Tensor, lower: Tensor) -> Tensor:
    """x lower, of a lower triangular one."""
    n = lower.shape[-1]
    if n < 2 * BLOCK:
        return x @ lower
    result = torch.empty_like(x)
    for columns in _blocks(n):
        torch.bmm(x[:, :, columns.start :], lower[:, columns.start :, columns], out=result[:, :, columns])
    return result


def mirrored(lower: Tensor) -> Tensor:
    """The symmetric matrix of which this is the lower half, in its memory."""
    if lower.shape[-1] >= 2 * BLOCK:
        for rows in _blocks(lower.shape[-1]):
            lower[:, : rows.start, rows] = lower[:, rows, : rows.start].mT
    return lower


def factor(matrix: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Lower Cholesky factors of what is on and below the diagonal; and the inverses of their diagonal's blocks.

    It never waits for the device, as `linalg.cholesky` does. Where a matrix is not positive definite, what is returned
    of it is no factor: look at what you make of it.
    """
    n = matrix.shape[-1]
    result = torch.zeros_like(matrix)
    inverses = []
    for rows in _blocks(n):
        panel = matrix[:, rows.start :, rows]
        if rows.start:
            done = result[:, rows.start :, : rows.start]
            panel = torch.baddbmm(panel, done, result[:, rows, : rows.start].mT, alpha=-1)
        size = rows.stop - rows.start
        own = torch.linalg.cholesky_ex(panel[:, :size])[0]
        one = torch.eye(size, dtype=own.dtype, device=own.device).expand_as(own)
        inverse = torch.linalg.solve_triangular(own, one, upper=False)
        result[:, rows, rows] = own
        if rows.stop < n:
            torch.bmm(panel[:, size:], inverse.mT, out=result[:, rows.stop :, rows])
        inverses.append(inverse)
    return result, inverses


def over(x: Tensor, lower: Tensor, inverses: list[Tensor]) -> Tensor:
    """x (lowerᵀ)⁻¹, with what `factor` returned."""
    result = torch.empty_like(x)
    for rows, inverse in zip(_blocks(lower.shape[-1]), inverses, strict=True):
        panel = x[:, :, rows]
        if rows.start:
            panel = torch.baddbmm(panel, result[:, :, : rows.start], lower[:, rows, : rows.start].mT, alpha=-1)
        torch.bmm(panel, inverse.mT, out=result[:, :, rows])
    return result
