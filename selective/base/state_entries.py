"""Entries of a base's state, nested ones included, read as plain numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def state_entries(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All entries, those in nested dictionaries as "outer.inner"."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from state_entries(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def dequantized(value: Tensor) -> Tensor:
    """A tensor subclass with a `dequantize()` of its own (torchao's 8-bit states) as a plain tensor."""
    if type(value) is not Tensor and hasattr(value, "dequantize"):
        return value.dequantize()
    return value
