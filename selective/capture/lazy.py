"""Parameters that have no shape yet: those of `nn.LazyLinear` and its like, before the first forward pass."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.nn.parameter import is_lazy

__all__ = ["initialized", "is_lazy"]


def initialized(params: Iterable[Tensor]) -> list[Tensor]:
    """Those that have a shape, and with it a number of dimensions and of elements."""
    return [p for p in params if not is_lazy(p)]
