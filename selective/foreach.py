"""Operations on lists of tensors in few kernel launches: torch's multi-tensor functions where they apply.

A multi-tensor function is fast if all of its tensors have one device, dtype and layout, and falls back to a loop over
the whole list otherwise. So lists are grouped by those first. Tensor subclasses (DTensor, quantised ones) go through
their own operations, one tensor after the other. Nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from selective.kernels import spec

# The elements of a part. A copy that is needed for a short time only is made of one part after the other. A part is
# 256 MiB in float32, which a GPU reads in a fifth of a millisecond, so that the few calls for each part do not count.
PART = 2**26

many_of: Any = torch  # the home of the multi-tensor functions, for which torch declares no types
_PLAIN = (Tensor, torch.nn.Parameter)


def parts(tensors: Sequence[Tensor]) -> Iterator[slice]:
    """Cut the list up, in order, into slices of at most `PART` elements each, or of one tensor that is larger."""
    start = count = 0
    for index, tensor in enumerate(tensors):
        if index > start and count + tensor.numel() > PART:
            yield slice(start, index)
            start, count = index, 0
        count += tensor.numel()
    if tensors:
        yield slice(start, len(tensors))


def _kinds(tensors: Sequence[Tensor]) -> list[tuple[object, ...] | None]:
    """The properties that tensors must share for a multi-tensor function to be fast; None for subclasses."""
    return [(t.device, t.dtype, t.is_contiguous()) if type(t) in _PLAIN else None for t in tensors]


def _run(many: Callable[..., Any], single: Callable[..., Any], *lists: Sequence[Tensor]) -> list[Tensor]:
    """Call `many` on the rows that are alike, and `single` on each row with a subclass in it. Returns their results.

    The results are in the order of the rows; they are None if the functions return nothing.
    """
    alike: dict[tuple[object, ...], list[int]] = {}
    results: list[Any] = [None] * len(lists[0])
    for index, kinds in enumerate(zip(*(_kinds(column) for column in lists), strict=True)):
        if None in kinds:
            results[index] = single(*(column[index] for column in lists))
        else:
            alike.setdefault(kinds, []).append(index)
    for indices in alike.values():
        outputs = many(*([column[i] for i in indices] for column in lists))
        for index, result in zip(indices, outputs or (), strict=outputs is not None):
            results[index] = result
    return results


def copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """target <- source, in the target's dtype."""
    _run(many_of._foreach_copy_, Tensor.copy_, targets, sources)


def zero_(tensors: Sequence[Tensor]) -> None:
    """tensor <- 0."""
    _run(many_of._foreach_zero_, Tensor.zero_, tensors)


def is_plain_and_dense(tensor: Tensor) -> bool:
    """True if it is no subclass and its memory has no gaps, in the usual order or channels last.

    Any other memory of the same size could then take its place.
    """
    return type(tensor) in _PLAIN and (
        tensor.is_contiguous()
        or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
        or (tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d))
    )


def zeros_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Zeros of the same sizes and strides as these dense tensors, cut out of few allocations.

    Each begins at a multiple of 512 bytes of its allocation.
    """
    alike: dict[tuple[object, ...], list[int]] = {}
    for index, t in enumerate(tensors):
        alike.setdefault((t.device, t.dtype), []).append(index)
    zeros: dict[int, Tensor] = {}
    for indices in alike.values():
        unit = max(512 // tensors[indices[0]].element_size(), 1)
        for part in parts([tensors[i] for i in indices]):
            chunk = indices[part]
            ends = list(accumulate(-(-tensors[i].numel() // unit) * unit for i in chunk))
            flat = tensors[chunk[0]].new_zeros(ends[-1])
            for index, start in zip(chunk, [0, *ends], strict=False):
                t = tensors[index]
                zeros[index] = flat.as_strided(t.size(), t.stride(), start)
    return [zeros[i] for i in range(len(tensors))]


def lerp_(targets: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    """target <- target + weight (end - target), in the target's dtype."""

    def many(a: list[Tensor], b: list[Tensor]) -> None:
        many_of._foreach_lerp_(a, in_dtype(b, a[0].dtype), weight)

    _run(many, lambda a, b: a.lerp_(b.to(a.dtype), weight), targets, ends)


def copies(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """A copy of each tensor in the same memory format, in `dtype` or its own."""

    def many(alike: list[Tensor]) -> list[Tensor]:
        copied = [torch.empty_like(t, dtype=dtype) for t in alike]
        many_of._foreach_copy_(copied, alike)
        return copied

    return _run(many, lambda t: t.clone() if dtype is None else t.to(dtype, copy=True), tensors)


def in_dtype(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Each tensor in this dtype: the tensor itself if it has the dtype, else a copy."""
    others = [i for i, t in enumerate(tensors) if t.dtype != dtype]
    converted = list(tensors)
    for index, copy in zip(others, copies([tensors[i] for i in others], dtype), strict=True):
        converted[index] = copy
    return converted


def negated(tensors: Sequence[Tensor]) -> list[Tensor]:
    """-tensor."""
    return _run(many_of._foreach_neg, torch.neg, tensors)


def neg_(tensors: Sequence[Tensor]) -> None:
    """tensor <- -tensor."""
    _run(many_of._foreach_neg_, Tensor.neg_, tensors)


def differences(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    """first - second."""
    return _run(many_of._foreach_sub, torch.sub, first, second)


def sums(first: Sequence[Tensor], second: Sequence[Tensor], scale: spec.Scalar, *, wide: bool = False) -> list[Tensor]:
    """first + scale second. With `wide` in float32, or in float64 if the second is. A scale on a GPU stays there."""

    def many(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
        dtype = _wide(b[0]) if wide else torch.promote_types(a[0].dtype, b[0].dtype)
        if a[0].dtype == b[0].dtype == dtype and not isinstance(scale, Tensor):
            return list(many_of._foreach_add(a, b, alpha=scale))
        totals = copies(a, dtype)
        _add_many(totals, b, scale)
        return totals

    def single(a: Tensor, b: Tensor) -> Tensor:
        return _sum_of(a.to(_wide(b)), b.to(_wide(b)), scale) if wide else _sum_of(a, b, scale)

    return _run(many, single, first, second)


def add_(targets: Sequence[Tensor], others: Sequence[Tensor], scale: spec.Scalar = 1.0) -> None:
    """target <- target + scale other, computed in the target's dtype. A scale on a GPU stays there."""
    _run(lambda a, b: _add_many(a, b, scale), lambda a, b: a.copy_(_sum_of(a, b, scale)), targets, others)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _sum_of(a: Tensor, b: Tensor, scale: spec.Scalar) -> Tensor:
    return a + b * scale if isinstance(scale, Tensor) else torch.add(a, b, alpha=scale)


def _add_many(targets: list[Tensor], others: list[Tensor], scale: spec.Scalar) -> None:
    dtype = targets[0].dtype
    if others[0].dtype == dtype and not isinstance(scale, Tensor):
        many_of._foreach_add_(targets, others, alpha=scale)
        return
    for part in parts(targets):  # torch would loop over two dtypes, and takes a tensor as a factor in products only
        chunk = in_dtype(others[part], dtype)
        if isinstance(scale, Tensor):
            many_of._foreach_add_(targets[part], list(many_of._foreach_mul(chunk, scale.to(targets[0].device, dtype))))
        else:
            many_of._foreach_add_(targets[part], chunk, alpha=scale)
