"""Newton-Schulz, matrix by matrix in float64: what the batched products of bfloat16 approximate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..spec import Scalar
from .rules import number


@torch.no_grad()
def newton_schulz_(
    stacks: Sequence[Tensor],
    scales: Sequence[Scalar],
    *,
    steps: int,
    coefficients: tuple[float, float, float],
    eps: float,
) -> None:
    """matrix <- scale * f(matrix / max(norm, eps)), for each matrix of each stack, in place.

    Arguments as for `selective.kernels.newton_schulz_`. All arithmetic is float64, and the result is rounded once, to
    the dtype of the stack.
    """
    a, b, c = coefficients
    for stack, scale in zip(stacks, scales, strict=True):
        for matrix in stack:
            x = matrix.double()
            x = x / torch.linalg.matrix_norm(x).clamp(min=eps)
            for _ in range(steps):
                square = x @ x.mT
                x = a * x + (b * square + c * square @ square) @ x
            matrix.copy_(number(scale) * x)
