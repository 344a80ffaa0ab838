"""Symmetric products and Cholesky factors made block by block, so that what is known is not computed.

A product that is symmetric, or of triangular factors, costs a general one half or more of its time in vain, and
factoring a stack of large matrices is slow: on an H100 `linalg.cholesky_ex` reaches 6 of the 50 TFLOP/s that products
have. Blocks of `BLOCK` rows leave nearly everything to products; matrices of less than two blocks go to torch as they
are. All functions take and return [batch, ., .].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
"""Rows. On an H100, 2,048 rows, stacks of 16 and 32: 2.13 and 1.81 ms a matrix for all of `solvers.cholesky` with
blocks of 256, 2.20 and 1.94 with 512, 2.63 and 2.38 with 1,024."""
FEW = 8
"""Smaller stacks are factored whole on a GPU, one after the other: 0.82 ms a matrix of 2,048 rows, and 0.90 to solve
with it, where blocks take 1.46 and 0.26 in a stack of 4, but 0.40 and 0.24 in one of 16."""


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


class Factor(NamedTuple):
    """Lower Cholesky factors, and the inverses of the blocks on their diagonals, where they were made in blocks."""

    lower: Tensor
    inverses: list[Tensor]


def factor(matrix: Tensor) -> Factor:
    """Of what is on and below the diagonal. It never waits for the device, as `linalg.cholesky` does.

    Where a matrix is not positive definite, what is returned of it is no factor: look at what you make of it.
    """
    n = matrix.shape[-1]
    if n >= 2 * BLOCK and matrix.is_cuda and len(matrix) < FEW:
        return Factor(torch.stack([torch.linalg.cholesky_ex(one)[0] for one in matrix]), [])
    if n < 2 * BLOCK:
        return Factor(torch.linalg.cholesky_ex(matrix)[0], [])
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
    return Factor(result, inverses)


def over(x: Tensor, factored: Factor) -> Tensor:
    """x (lowerᵀ)⁻¹."""
    lower, inverses = factored
    if not inverses:
        return torch.linalg.solve_triangular(lower.mT, x, upper=True, left=False)
    result = torch.empty_like(x)
    for rows, inverse in zip(_blocks(lower.shape[-1]), inverses, strict=True):
        panel = x[:, :, rows]
        if rows.start:
            panel = torch.baddbmm(panel, result[:, :, : rows.start], lower[:, rows, : rows.start].mT, alpha=-1)
        torch.bmm(panel, inverse.mT, out=result[:, :, rows])
    return result
