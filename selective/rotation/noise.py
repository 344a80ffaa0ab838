"""Rounding noise in rotated matrices, for a base whose update does not shrink with the gradient.

Note [signs of noise]: a row of zeros, such as that of a token that never occurs, is a null direction of all gradients.
Basis vectors of null directions are orthogonal to the others up to rounding. So the rotated gradient has noise there,
and not zeros. Adam divides noise by the root of its square, to which ε is added. Lion takes its sign and makes full
steps: rows that no gradient had touched moved by more than a hundred times the learning rate. So elements of rotated
gradients, and of first moments that were carried into a new basis, are set to 0 below `FLOOR` · eps · ‖X‖, with
float32's eps and the Frobenius norm. The error of an element of PᵀGQ is a small multiple of eps times ‖G‖: of two dot
products, and of basis vectors that are not quite orthogonal. It does not grow with products in TF32 or bfloat16, where
rows of zeros are concerned: these round what they multiply, and multiply with zeros.

The floor costs next to nothing: of 512 x 512 normal numbers 0.3 % are below it, and Lion takes the sign of an average.
Two things remain. A direction with σ below √eps · σ₁ can't be told from null ones by a Gram matrix, so a basis may mix
them. And until a direction was seen, it is one of the null ones, and the basis there is any.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 64.0


def clear_noise_(x: Tensor) -> None:
    """Set elements of matrices [..., rows, columns] to 0 that are rounding noise, in place: Note [signs of noise].

    They are read for the norms, and again to be written. Matrices that are not finite stay as they are.
    """
    if not x.numel():
        return
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float64)
    limit = norm * (FLOOR * torch.finfo(torch.float32).eps)
    x.masked_fill_(x.abs() < torch.where(limit.isfinite(), limit, 0.0).to(torch.float32), 0.0)
