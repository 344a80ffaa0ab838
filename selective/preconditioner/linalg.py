"""Products of batches of matrices in a given precision, stacking, and a check that bases are orthogonal."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, ContextDecorator
from typing import Any, Literal

import torch
from torch import Tensor

from selective.preconditioner.blocked import symmetric_product

many_of: Any = torch  # has the multi-tensor functions, for which torch declares no types

Precision = Literal["float32", "tf32", "bfloat16"]

STACKED = 2**22
"""Elements of one stacked product in a step, 16 MiB. The time for small matrices is that of launches, which stacking
saves. For larger ones, copying them into a stack takes longer than it saves."""
REFRESHED = 2**27
"""Elements that are refreshed together, 512 MiB a stack. On an H100 and for 2,048 rows, a stack of 32 matrices took 1.8
ms a matrix to solve, one of 16 took 2.1, one of 4 took 4.2: factoring a single matrix leaves most of a GPU idle."""
REFRESHED_ON_LARGE = 2**28
"""The same on a GPU with `LARGE_GPU` bytes or more. On an H200, 36 matrices of 2,048 rows take 60 ms in one stack.
Stacks of 24 and 12 take 49 and 28."""
LARGE_GPU = 64 << 30
LOOSE = 3e-3
"""Largest ‖QᵀQ − I‖ of a basis that is trusted. One Newton-Schulz step takes the spectral norm to ¾ of its square,
7e-6, and so below 1e-5. The Frobenius norm is compared with it, which is cheap and bounds the spectral norm from above.
After the step the Frobenius norm may be larger, because the rounding errors of n² elements add up: to 1.3e-5 at n =
2,048, where the spectral norm is 6e-7."""
LOOSE_IN_TF32 = 2e-3
"""The same where the step is taken in TF32, as on a GPU. TF32 cuts off up to 2⁻¹⁰ of each factor, which changes QᵀQ by
up to 2⁻⁹ ‖E‖: 4e-6, beside the 3e-6 that are ¾ of the square."""


MKLDNN: Any = torch.backends.mkldnn  # has flags of its own, for which torch declares no types
_FLAGS = threading.RLock()


class _Products(ContextDecorator):
    """The context that `float32_products` returns. It is a class because a step enters several for each group."""

    def __init__(self, precision: Literal["ieee", "tf32"]) -> None:
        self.precision = precision
        # "none" is what flags say that nobody has set, and float32 then. It is the usual case.
        self.as_good = ("ieee", "none") if precision == "ieee" else (precision,)
        self.saved: list[list[tuple[Any, str]]] = []  # of each entry: the flags that were set, with what they had

    def __enter__(self) -> None:
        _FLAGS.acquire()
        flags: tuple[Any, ...] = (torch.backends.cuda.matmul, MKLDNN.matmul)
        found = [(flag, flag.fp32_precision) for flag in flags]
        if all(before in self.as_good for _, before in found):
            found = []
        for flag, _ in found:
            flag.fp32_precision = self.precision
        self.saved.append(found)

    def __exit__(self, *error: object) -> None:
        for flag, before in self.saved.pop():
            flag.fp32_precision = "none"  # then it reads as the backend's or torch's own flag: was it this?
            if flag.fp32_precision != before:
                flag.fp32_precision = before
        _FLAGS.release()


_PRODUCTS = {"ieee": _Products("ieee"), "tf32": _Products("tf32")}


def float32_products(precision: Literal["ieee", "tf32"] = "ieee") -> _Products:
    """Set the precision of products of float32 matrices, and restore torch's flags afterwards.

    The flags of CUDA and of oneDNN are set, since on CPUs oneDNN may use TF32 or bfloat16 too. They belong to the
    process, so that products in other threads are affected meanwhile. A second thread that enters here waits, because
    both would otherwise restore each other's flags.
    """
    return _PRODUCTS[precision]


def in_precision(precision: Precision) -> AbstractContextManager[None]:
    """Return a context for float32 products in this precision; with "bfloat16", `stack` rounds the factors instead."""
    return float32_products("tf32" if precision == "tf32" else "ieee")


def stacked_at_once(precision: Precision) -> int:
    """Return the elements of one stacked product in a step: more for bfloat16, where factors are copied in any case."""
    return REFRESHED if precision == "bfloat16" else STACKED


def refreshed_at_once(device: torch.device) -> int:
    """Return the elements that are refreshed together on this device."""
    if device.type != "cuda" or torch.cuda.get_device_properties(device).total_memory < LARGE_GPU:
        return REFRESHED
    return REFRESHED_ON_LARGE


def batches(count: int, numel: int, limit: int) -> list[slice]:
    """Divide `count` tensors of `numel` elements into ranges of nearly equal length.

    Each has at least one tensor, and at most `limit` elements if it has more than one.
    """
    most = max(1, limit // max(numel, 1))
    size = math.ceil(count / max(math.ceil(count / most), 1))
    return [slice(start, min(start + size, count)) for start in range(0, count, size or 1)]


def stack(tensors: Sequence[Tensor], precision: Precision = "float32") -> Tensor:
    """Concatenate tensors [batch, ., .]; without a copy if they already lie one after the other in memory.

    With "bfloat16" they are rounded to it.
    """
    if precision != "bfloat16":
        whole = tensors[0] if len(tensors) == 1 else _in_one_piece(tensors)
        return torch.cat(tuple(tensors)) if whole is None else whole
    if len(tensors) == 1 or tensors[0].dtype == torch.bfloat16:
        return stack(tensors).bfloat16()
    batch, *rest = tensors[0].shape
    rounded = tensors[0].new_empty((batch * len(tensors), *rest), dtype=torch.bfloat16)
    copy_to(rounded.split(batch), tensors)
    return rounded


def _in_one_piece(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return a view of tensors of one shape that lie one after the other in a buffer; None if they do not."""
    first = tensors[0]
    storage, place, step = first.untyped_storage().data_ptr(), first.storage_offset(), first.numel()
    for number, x in enumerate(tensors):
        if not x.is_contiguous() or x.storage_offset() != place + number * step:
            return None
        if x.untyped_storage().data_ptr() != storage or not storage:
            return None
    shape = (len(first) * len(tensors), *first.shape[1:])  # the first stride of a single matrix may be anything
    return first.as_strided(shape, [math.prod(shape[d + 1 :]) for d in range(len(shape))])


def copy_to(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source to its target, with few operations."""
    many_of._foreach_copy_(list(targets), list(sources))


def add_to(counters: Sequence[Tensor], amounts: Tensor) -> None:
    """Add to each 0-d counter its element of the 1-d `amounts`, in place."""
    many_of._foreach_add_(list(counters), list(amounts.unbind()))


def zero(tensors: Sequence[Tensor]) -> None:
    """Set all tensors to 0, in place."""
    many_of._foreach_zero_(list(tensors))


def per_matrix(x: Tensor) -> Tensor:
    """Reshape [batch] to [batch, 1, 1]."""
    return x[:, None, None]


def finite(x: Tensor) -> Tensor:
    """Return bool [batch]: True where a matrix has finite elements only."""
    return x.abs().amax((1, 2)) < torch.inf  # NaN if there is one; `isfinite` takes four operations


def identity_like(x: Tensor) -> Tensor:
    """Return matrices of the shape of x [batch, m, n] with ones on the diagonal and zeros elsewhere."""
    return torch.eye(x.shape[-2], x.shape[-1], dtype=x.dtype, device=x.device).expand_as(x)


@float32_products()
def settle(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Take one Newton-Schulz step to the nearest orthogonal matrix.

    Return the result, and bool [batch]: True where it is trusted.

    The step Q (3I − QᵀQ)/2 takes E = QᵀQ − I to −¾E² − ¼E³. So the spectral norm of E is below 1e-5 for a trusted
    result, whatever solver it came from. A basis that is not finite, or not nearly orthogonal, is not trusted.

    E is computed in float32. It is so small that its product with Q is as exact as need be in TF32 on a GPU.
    """
    in_tf32 = basis.is_cuda and basis.dtype == torch.float32
    error = symmetric_product(basis, basis)
    error.diagonal(dim1=-2, dim2=-1).sub_(1)
    trusted = error.flatten(1).norm(dim=1) <= (LOOSE_IN_TF32 if in_tf32 else LOOSE)  # False for NaN
    with float32_products("tf32" if in_tf32 else "ieee"):
        return torch.baddbmm(basis, basis, error, alpha=-0.5), trusted


def in_order(x: Tensor, order: Tensor, dim: Literal[1, 2] = 2) -> Tensor:
    """Permute the columns (`dim` 2) or rows (1) of each matrix of x [batch, rows, columns] by `order` [batch, n].

    Unlike `take_along_dim` it makes no index tensor of the size of x.
    """
    if len(x) == 1:
        return x.index_select(dim, order[0])  # copies whole rows, without an index for each element
    return x.gather(dim, (order[:, :, None] if dim == 1 else order[:, None, :]).expand_as(x))


def align(new: Tensor, old: Tensor) -> Tensor:
    """Return `new` with signs of its columns such that each has a product >= 0 with the old column at its place.

    The sign of an eigenvector is arbitrary. If the solver chose it, it could negate momentum that is not carried.
    """
    against = (new * old).sum(-2, keepdim=True) < 0
    return torch.where(against, -new, new)
