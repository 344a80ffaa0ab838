"""Layouts: the class, dtype, device, shape and strides of many tensors, compared in one call.

A step compares what it knows of some hundred tensors with what they are now. Read attribute by attribute, that takes
longer on the host than all launches. torch has the comparison in C++: `TensorGuards`, with which compiled code finds
out if it still holds. It is not public. So it is used only with versions of torch with which it was tried; with others
the same is compared in Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

FIRST, LAST = (2, 9), (2, 13)  # the versions of torch with which `TensorGuards` was tried
PLAIN = (Tensor, Parameter)


_GUARDS: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)  # written in C++, and imported with torch


def are_compared_by_torch() -> bool:
    """True if this torch is one with whose `TensorGuards` layouts can be compared."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return FIRST <= version <= LAST and hasattr(_GUARDS, "TensorGuards")


BY_TORCH = are_compared_by_torch()


class Layouts:
    """The layouts of some tensors, all of a plain class and strided. The tensors are not kept alive.

    `layouts_of` makes them. What is at an address in memory is no part of a layout.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.count = len(tensors)
        self._check: Any = None
        self._facts: list[tuple[Any, ...]] = []
        if BY_TORCH:
            sizes, strides = [list(x.shape) for x in tensors], [list(x.stride()) for x in tensors]
            guards = _GUARDS.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
            self._check = guards.check
        else:
            self._facts = [_facts_of(x) for x in tensors]

    def are_of(self, tensors: Sequence[Any]) -> bool:
        """True if these tensors, in this order, have exactly these layouts. Objects of any class may be among them.

        False means that something may be different, and has to be looked at: torch also compares whether gradients are
        recorded for a tensor, and modes of the thread such as autocast and inference mode, and says False if one tensor
        is there twice.
        """
        if len(tensors) != self.count:
            return False
        if self._check is not None:
            return self._check(*tensors)
        return all(type(x) in PLAIN and _facts_of(x) == facts for x, facts in zip(tensors, self._facts, strict=True))


def layouts_of(tensors: Sequence[Any]) -> Layouts | None:
    """The layouts of these tensors; None if one of them is of another class than torch's own two, or not strided."""
    plain = all(type(x) in PLAIN and x.layout is torch.strided for x in tensors)
    return Layouts(tensors) if plain else None


def _facts_of(x: Tensor) -> tuple[Any, ...]:
    strides = x.stride() if x.layout is torch.strided else None
    return type(x), x.dtype, x.device, x.shape, strides
