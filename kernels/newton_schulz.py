"""Newton-Schulz of many matrices of one shape at once: the update of Muon, in three batched products an iteration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .spec import Scalar


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

    f leaves the singular vectors as they are, and takes each singular value x to the result of `steps` iterations
    x <- a x + b x^3 + c x^5, with (a, b, c) the `coefficients`. The norm is Frobenius's. Muon's coefficients take
    singular values to between about 0.7 and 1.2 (Keller Jordan, https://kellerjordan.github.io/posts/muon).

    Args:
        stacks: [count, rows, columns], float32 or float64, on one device: the matrices of one shape, or of a shape and
            its transposed one. All are iterated in one batch, as matrices that are not taller than wide.
        scales: one number for each stack; tensors are 0-d, on any device, and the host does not wait for them.

    The products are bfloat16, with sums in float32, as torch's Muon has them. Norm and quotient are taken before the
    matrix is rounded, so that there is one rounding where torch has three. A matrix that is not finite leaves the
    others as they are. The last bits of a result can depend on the number of matrices, because a GPU's library chooses
    its products by it.

    Reads and writes, of float32: 16 bytes an element before and after the iterations. Each iteration takes 12, and 14
    for each element of the square matrices of the shorter side: a product that adds begins with a copy of what it adds
    to. Memory: 4 bytes for each element of the stacks and of the square matrices, until it returns.
    """
    a, b, c = coefficients
    counts = [len(stack) for stack in stacks]
    rows, columns = sorted(stacks[0].shape[1:])
    x = torch.empty((sum(counts), rows, columns), dtype=torch.bfloat16, device=stacks[0].device)
    for stack, wide in zip(stacks, x.split(counts), strict=True):
        norms = torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True).clamp_(min=eps)
        torch.div(_as_wide(stack), norms, out=wide)
    following, square = torch.empty_like(x), x.new_empty((len(x), rows, rows))
    polynomial = torch.empty_like(square)
    for _ in range(steps):
        torch.bmm(x, x.mT, out=square)
        torch.baddbmm(square, square, square, beta=b, alpha=c, out=polynomial)
        torch.baddbmm(x, polynomial, x, beta=a, out=following)
        x, following = following, x
    for stack, wide, scale in zip(stacks, x.split(counts), scales, strict=True):
        torch.mul(wide, _factor(scale, stack), out=_as_wide(stack))


def _as_wide(stack: Tensor) -> Tensor:
    """The same memory, as matrices that are not taller than wide."""
    return stack.mT if stack.shape[1] > stack.shape[2] else stack


def _factor(scale: Scalar, stack: Tensor) -> Tensor:
    """The scale in the dtype of the stack. It is no 0-d tensor, so that a product with bfloat16 has its dtype."""
    if isinstance(scale, Tensor) and scale.device.type == "cpu":  # to send it would wait for the device
        scale = float(scale)
    if isinstance(scale, Tensor):
        return scale.to(stack.device, stack.dtype).reshape(1, 1, 1)
    return stack.new_full((1, 1, 1), scale)
