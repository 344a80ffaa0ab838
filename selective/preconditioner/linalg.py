"""Products of batches of matrices in exactly the precision that is asked for, and how orthogonal a basis is."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from selective.preconditioner.blocked import lower_product, mirrored

many_of: Any = torch  # where the multi-tensor functions are; torch declares no types of them

Precision = Literal["float32", "tf32", "bfloat16"]

STACKED = 2**22
"""Elements of one stacked product in a step, 16 MiB. Small matrices are bound by launches and gain from stacking;
copying larger ones together costs more than it saves."""
REFRESHED = 2**27
"""Elements that are refreshed together, 512 MiB a stack. On an H100 a stack of 16 matrices of 2,048 rows took 2.1 ms a
matrix to solve, one of 32 took 1.8, one of 4 took 4.2: factoring a single one leaves most of a GPU without work."""
LOOSE = 3e-3
"""Largest ‖QᵀQ − I‖ from which one Newton-Schulz step leads below 1e-5: to ¾ of its square, 7e-6. Held against the
Frobenius norm, which is cheap and bounds the spectral one. The 1e-5 are of the spectral norm: in the other the rounding
of n² elements adds up, to 1.3e-5 at n = 2,048, where the spectral norm is 6e-7."""


_FLAGS = threading.RLock()


@contextmanager
def float32_products(precision: Literal["ieee", "tf32"] = "ieee") -> Iterator[None]:
    """Products of float32 matrices in this precision, whatever torch's flags say; the flags are left as found.

    On CUDA devices, and on CPUs, where oneDNN may take TF32 or bfloat16 as well. The flags are the process's: another
    thread that multiplies at the same time sees them too; one that comes here waits, so that nobody puts back what
    somebody else has set.
    """
    flags = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul"))  # noqa: B009 (unknown to type checkers)
    with _FLAGS:
        found = [flag.fp32_precision for flag in flags]
        try:
            for flag in flags:
                flag.fp32_precision = precision
            yield
        finally:
            for flag, before in zip(flags, found, strict=True):
                flag.fp32_precision = "none"  # as the backend's or torch's own flag says: was it that?
                if flag.fp32_precision != before:
                    flag.fp32_precision = before


def in_precision(precision: Precision) -> AbstractContextManager[None]:
    """Where float32 products are made in it; "bfloat16" is a matter of the factors, see `stack`."""
    return float32_products("tf32" if precision == "tf32" else "ieee")


def stacked_at_once(precision: Precision) -> int:
    """Elements of one stacked product in a step. Those that are rounded to bfloat16 are copied in any case."""
    return REFRESHED if precision == "bfloat16" else STACKED


def batches(count: int, numel: int, limit: int) -> list[slice]:
    """Ranges over `count` tensors of `numel` elements, `limit` elements at most but one tensor at least; even."""
    most = max(1, limit // max(numel, 1))
    size = math.ceil(count / max(math.ceil(count / most), 1))
    return [slice(start, min(start + size, count)) for start in range(0, count, size or 1)]


def stack(tensors: Sequence[Tensor], precision: Precision = "float32") -> Tensor:
    """[batch, ., .] of each, one after the other; no copy where they lie like that already. "bfloat16": rounded."""
    if precision != "bfloat16":
        whole = tensors[0] if len(tensors) == 1 else _in_one_piece(tensors)
        return torch.cat(tuple(tensors)) if whole is None else whole
    if len(tensors) == 1 or tensors[0].dtype == torch.bfloat16:
        return stack(tensors).bfloat16()
    batch, *rest = tensors[0].shape
    made = tensors[0].new_empty((batch * len(tensors), *rest), dtype=torch.bfloat16)
    copy_to(made.split(batch), tensors)
    return made


def _in_one_piece(tensors: Sequence[Tensor]) -> Tensor | None:
    """Equal tensors that lie one after the other in one buffer, as one; None where they do not."""
    first = tensors[0]
    storage, place, step = first.untyped_storage().data_ptr(), first.storage_offset(), first.numel()
    for number, x in enumerate(tensors):
        if not x.is_contiguous() or x.storage_offset() != place + number * step:
            return None
        if x.untyped_storage().data_ptr() != storage or not storage:
            return None
    shape = (len(first) * len(tensors), *first.shape[1:])  # the stride of a single matrix means nothing
    return first.as_strided(shape, [math.prod(shape[d + 1 :]) for d in range(len(shape))])


def copy_to(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """target ← source, in a few operations for all."""
    many_of._foreach_copy_(list(targets), list(sources))


def add_to(counters: Sequence[Tensor], amounts: Tensor) -> None:
    """counter ← counter + amount, 0-d each; amounts: one for each counter."""
    many_of._foreach_add_(list(counters), list(amounts.unbind()))


def zero(tensors: Sequence[Tensor]) -> None:
    many_of._foreach_zero_(list(tensors))


def per_matrix(x: Tensor) -> Tensor:
    """[batch] -> [batch, 1, 1]."""
    return x[:, None, None]


def finite(x: Tensor) -> Tensor:
    """Which matrices [batch] have finite numbers only."""
    return x.isfinite().flatten(1).all(1)


def identity_like(x: Tensor) -> Tensor:
    """The identity, or what of it fits, for each matrix of x [batch, m, n]."""
    return torch.eye(x.shape[-2], x.shape[-1], dtype=x.dtype, device=x.device).expand_as(x)


@float32_products()
def settle(basis: Tensor) -> tuple[Tensor, Tensor]:
    """The basis after one Newton-Schulz step to the nearest orthogonal matrix, and which [batch] can be trusted.

    Q (3I − QᵀQ)/2 takes E = QᵀQ − I to −¾E² − ¼E³, so that a spectral norm of 1e-5 holds by construction for what is
    trusted, whatever solver it came from. What was not nearly orthogonal, or not finite, is not trusted.
    """
    error = mirrored(lower_product(basis, basis))
    error.diagonal(dim1=-2, dim2=-1).sub_(1)
    trusted = error.flatten(1).norm(dim=1) <= LOOSE  # False for NaN
    return torch.baddbmm(basis, basis, error, alpha=-0.5), trusted


def in_order(x: Tensor, order: Tensor, dim: Literal[1, 2] = 2) -> Tensor:
    """Columns (2) or rows (1) of each matrix of x [batch, rows, columns] in its order [batch, n]. Unlike
    `take_along_dim` it makes no indices as large as x."""
    if len(x) == 1:
        return x.index_select(dim, order[0])  # whole rows at a time, and no index for each element
    return x.gather(dim, (order[:, :, None] if dim == 1 else order[:, None, :]).expand_as(x))


def align(new: Tensor, old: Tensor) -> Tensor:
    """`new` with the signs of its columns such that each points to the same side as the old one at its place.

    A sign of an eigenvector means nothing; left to the solver, it would turn momentum round that is not carried.
    """
    against = (new * old).sum(-2, keepdim=True) < 0
    return torch.where(against, -new, new)
