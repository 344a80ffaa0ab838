"""Products of float32 matrices and averages of Gram matrices, in torch's own products."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def average_grams_(
    rows: Tensor | None,
    columns: Tensor | None,
    x: Tensor,
    *,
    factors: Tensor | float,
    left_out: Tensor | None,
    weight: float,
) -> None:
    """Arguments as for `selective.kernels.average_grams_`. Matrices of x that are left out are set to 0."""
    if left_out is not None:
        x.masked_fill_(left_out[:, None, None], 0.0)
    by_matrix = factors[:, None, None] if isinstance(factors, Tensor) else factors
    for average, first in ((rows, x), (columns, x.mT)):
        if average is not None:
            average.mul_(by_matrix).baddbmm_(first, first.mT, beta=1, alpha=weight)


@torch.no_grad()
def float32_product(
    a: Tensor, b: Tensor, *, symmetric: bool = False, upper_a: bool = False, lower_b: bool = False
) -> Tensor:
    """Arguments as for `selective.kernels.float32_product`; all of the product is computed."""
    return a @ b
