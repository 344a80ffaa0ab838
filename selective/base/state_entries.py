"""Iteration over the entries of a base's state, nested ones included, and reading of quantised entries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def state_entries(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over names and values of all entries; those in nested dictionaries are named "outer.inner"."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from state_entries(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def dequantized(value: Tensor) -> Tensor:
    """Return a tensor with a `dequantize()` method (torchao's 8-bit states) as a plain one; others as they are."""
    if type(value) is not Tensor and hasattr(value, "dequantize"):
        return value.dequantize()
    return value
