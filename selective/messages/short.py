"""The text of any value, short enough for a message."""

from __future__ import annotations

import reprlib
from typing import Any


def short(data: Any) -> str:
    """The repr of `data`, shortened where it is nested too deeply for Python or too long to be read."""
    shortened = reprlib.Repr()
    shortened.maxstring = shortened.maxother = shortened.maxlong = 80
    return shortened.repr(data)
