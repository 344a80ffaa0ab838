"""Symmetric products, triangular products and Cholesky factors, computed block by block to save work.

A general product wastes half of its time or more if the result is symmetric or a factor is triangular. Factoring a
stack of large matrices is slow: on an H100 `linalg.cholesky_ex` reaches 6 TFLOP/s, while products reach 50. With blocks
of `BLOCK` rows, nearly all work is products. Matrices of less than two blocks go to torch as they are. All functions
take and return [batch, ., .]. On a GPU with Triton, products of float32 are a kernel's, which leaves out as much
(`selective.kernels.float32_product`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from selective.kernels import float32_product, has_float32_products

BY_KERNEL: dict[str, bool] = {"symmetric": True, "triangular": True, "general": True, "panels": True}
"""The kinds of products in a refresh that the kernel computes where it can; the others are torch's."""
BLOCK = 256
"""Rows of a block. All of `solvers.cholesky` on an H100, for stacks of 16 and 32 matrices of 2,048 rows, takes 2.13 and
1.81 ms a matrix with blocks of 256 rows, 2.20 and 1.94 with 512, 2.63 and 2.38 with 1,024."""
FEW = 8
"""A stack of fewer matrices is factored without blocks on a GPU, one matrix after the other. With 2,048 rows that takes
0.82 ms a matrix, and solving with it 0.90. Blocks take 1.46 and 0.26 ms in a stack of 4, and 0.40 and 0.24 in one of
16."""


def _blocks(n: int) -> Iterator[slice]:
    size = BLOCK if n >= 2 * BLOCK else max(n, 1)
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _by_kernel(kind: str, a: Tensor, b: Tensor) -> bool:
    return BY_KERNEL[kind] and has_float32_products(a, b)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b."""
    return float32_product(a, b) if _by_kernel("general", a, b) else a @ b


def _minus(panel: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return panel - a b."""
    if _by_kernel("panels", a, b):
        return panel - float32_product(a, b)
    return torch.baddbmm(panel, a, b, alpha=-1)


def symmetric_product(a: Tensor, b: Tensor) -> Tensor:
    """Return aᵀ b, which is known to be symmetric."""
    lower = lower_product(a, b)
    return lower if _by_kernel("symmetric", a, b) else mirrored(lower)


def lower_product(a: Tensor, b: Tensor) -> Tensor:
    """Return aᵀ b, right on and below the diagonal; above it, only blocks on the diagonal are set."""
    if _by_kernel("symmetric", a, b):
        return float32_product(a.mT, b, symmetric=True)
    n = a.shape[-1]
    if n < 2 * BLOCK:
        return a.mT @ b
    result = a.new_empty(len(a), n, n)
    for rows in _blocks(n):
        torch.bmm(a[:, :, rows].mT, b[:, :, : rows.stop], out=result[:, rows, : rows.stop])
    return result


def squared(root: Tensor) -> Tensor:
    """Return rootᵀ root for lower triangular `root`, right on and below the diagonal as in `lower_product`."""
    if _by_kernel("symmetric", root, root):
        return float32_product(root.mT, root, symmetric=True, upper_a=True)
    n = root.shape[-1]
    if n < 2 * BLOCK:
        return root.mT @ root
    result = torch.empty_like(root)
    for rows in _blocks(n):
        below = root[:, rows.start :]
        torch.bmm(below[:, :, rows].mT, below[:, :, : rows.stop], out=result[:, rows, : rows.stop])
    return result


def times_lower(x: Tensor, lower: Tensor) -> Tensor:
    """Return the product x lower, where `lower` is lower triangular."""
    if _by_kernel("triangular", x, lower):
        return float32_product(x, lower, lower_b=True)
    n = lower.shape[-1]
    if n < 2 * BLOCK:
        return x @ lower
    result = torch.empty_like(x)
    for columns in _blocks(n):
        torch.bmm(x[:, :, columns.start :], lower[:, columns.start :, columns], out=result[:, :, columns])
    return result


def mirrored(lower: Tensor) -> Tensor:
    """Copy the lower half of a symmetric matrix to its upper half, in place, and return it."""
    if lower.shape[-1] >= 2 * BLOCK:
        for rows in _blocks(lower.shape[-1]):
            lower[:, : rows.start, rows] = lower[:, rows, : rows.start].mT
    return lower


class Factor(NamedTuple):
    """Lower Cholesky factors, and the inverses of the blocks on their diagonals; no inverses without blocks."""

    lower: Tensor
    inverses: list[Tensor]


def factor(matrix: Tensor) -> Factor:
    """Return the Cholesky factors of symmetric matrices, of which only the lower half is read.

    It does not wait for the device, unlike `linalg.cholesky`. If a matrix is not positive definite, the result is not a
    factor, and the caller has to check what is computed with it.
    """
    n = matrix.shape[-1]
    if n >= 2 * BLOCK and matrix.is_cuda and len(matrix) < FEW:
        return Factor(torch.stack([torch.linalg.cholesky_ex(single)[0] for single in matrix]), [])
    if n < 2 * BLOCK:
        return Factor(torch.linalg.cholesky_ex(matrix)[0], [])
    result = torch.zeros_like(matrix)
    inverses = []
    for rows in _blocks(n):
        panel = matrix[:, rows.start :, rows]
        if rows.start:
            done = result[:, rows.start :, : rows.start]
            panel = _minus(panel, done, result[:, rows, : rows.start].mT)
        size = rows.stop - rows.start
        diagonal = torch.linalg.cholesky_ex(panel[:, :size])[0]
        identity = torch.eye(size, dtype=diagonal.dtype, device=diagonal.device).expand_as(diagonal)
        inverse = torch.linalg.solve_triangular(diagonal, identity, upper=False)
        result[:, rows, rows] = diagonal
        if rows.stop < n:
            torch.bmm(panel[:, size:], inverse.mT, out=result[:, rows.stop :, rows])
        inverses.append(inverse)
    return Factor(result, inverses)


def over(x: Tensor, factored: Factor) -> Tensor:
    """Return x (lowerᵀ)⁻¹ for a Cholesky factor."""
    lower, inverses = factored
    if not inverses:
        return torch.linalg.solve_triangular(lower.mT, x, upper=True, left=False)
    result = torch.empty_like(x)
    for rows, inverse in zip(_blocks(lower.shape[-1]), inverses, strict=True):
        panel = x[:, :, rows]
        if rows.start:
            panel = _minus(panel, result[:, :, : rows.start], lower[:, rows, : rows.start].mT)
        torch.bmm(panel, inverse.mT, out=result[:, :, rows])
    return result
