"""Products of stacks of float32 matrices, as exact as float32: in Triton on a GPU, by torch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from ._dispatch import Backend, _chosen, _gpu, why_no_triton


def average_grams_(
    rows: Tensor | None,
    columns: Tensor | None,
    x: Tensor,
    *,
    factors: Tensor | float,
    left_out: Tensor | None,
    weight: float,
    backend: Backend = "auto",
) -> None:
    """rows <- factor rows + weight G G^T, columns <- factor columns + weight G^T G, for each matrix G of x, in place.

    Args:
        rows: float32 [count, m, m], contiguous; or None. On a GPU its lower half is read, and both are written.
        columns: float32 [count, n, n], likewise.
        x: float32 [count, m, n], in memory of any strides. It may be written to where a matrix is left out.
        factors: float32 [count], or one number for all.
        left_out: bool [count]. Where it is True, a product counts as zeros, whatever is in G. With a factor of 1 an
            average keeps its bits. None: False everywhere.
        weight: of all products.

    A NaN or an infinity in a matrix that is not left out reaches its averages. On a GPU with Triton the products are
    three of TF32 each (Note [three products] in `gpu/device/products.py`), half of each is computed, and the results
    are symmetric to the bit. Elsewhere they are torch's: of the precision that torch's flags say.
    """
    given = [each for each in (rows, columns, x) if each is not None]
    if not _on_gpu(backend, *given):
        reference.average_grams_(rows, columns, x, factors=factors, left_out=left_out, weight=weight)
        return
    if left_out is None:
        left_out = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    if not isinstance(factors, Tensor):
        factors = torch.full((len(x),), factors, dtype=torch.float32, device=x.device)
    _gpu().average_grams_(rows, columns, x, factors=factors, left_out=left_out, weight=weight)


def float32_product(
    a: Tensor,
    b: Tensor,
    *,
    symmetric: bool = False,
    upper_a: bool = False,
    lower_b: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """The products A B of two stacks, float32 [count, m, k] and [count, k, n], in memory of any strides.

    `symmetric` says that the products are known to be symmetric: on a GPU with Triton half of each is computed then,
    and mirrored. `upper_a` and `lower_b` say that A is upper triangular or B lower triangular: most of the terms that
    are 0 are left out there. The products are three of TF32 each there. Elsewhere they are torch's, of the precision
    that torch's flags say, and computed as a whole.
    """
    implementation = _gpu() if _on_gpu(backend, a, b) else reference
    return implementation.float32_product(a, b, symmetric=symmetric, upper_a=upper_a, lower_b=lower_b)


def has_float32_products(*tensors: Tensor, backend: Backend = "auto") -> bool:
    """True if the Triton kernels would multiply these stacks."""
    return _on_gpu(backend, *tensors)


def _on_gpu(backend: Backend, *tensors: Tensor) -> bool:
    """True if the kernels multiply these stacks.

    Raises a ValueError if the backend "gpu" is asked for and can't take them.
    """
    backend = _chosen(backend)
    if backend not in ("auto", "gpu") or (backend == "auto" and not tensors[0].is_cuda):
        return False
    if why_no_triton() is None and _gpu().multiplies(*tensors):
        return True
    if backend == "gpu":
        reason = why_no_triton() or "the tensors are no stacks [count, rows, columns] of float32"
        raise ValueError(f"backend 'gpu' can't multiply: {reason}; pass backend='auto'")
    return False
