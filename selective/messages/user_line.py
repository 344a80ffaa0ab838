"""Warnings that name the line of the user's own code, however deep in the library they are given."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

_NOT_THE_USER = ("selective", "torch")  # top-level packages


def warn(message: str) -> None:
    """Warn at the nearest line that is neither ours nor torch's."""
    frame: FrameType | None = sys._getframe(1)
    level = 2  # of that frame, as `warnings.warn` counts
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USER:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
