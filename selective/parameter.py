"""A parameter as the wrapper knows it, and parameters that have no shape yet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.parameter import is_lazy


@dataclass(frozen=True)
class Parameter:
    """A parameter with what identifies it: its index in the optimizer (for randomness) and its name (for people)."""

    tensor: Tensor
    address: int
    name: str
    group: int  # index of its parameter group


def initialized(params: Iterable[Tensor]) -> list[Tensor]:
    """Those that have a shape, and with it a number of dimensions and of elements."""
    return [p for p in params if not is_lazy(p)]
