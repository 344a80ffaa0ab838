"""Counts, names and bytes in words."""

from __future__ import annotations

from collections.abc import Sequence

_MOST = 4  # names in one list


def counted(number: int, what: str) -> str:
    """Return "1 tensor", "3 tensors"."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def is_or_are(number: int) -> str:
    """Return the verb of so many things."""
    return "is" if number == 1 else "are"


def listed(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = len(names) - _MOST
    return ", ".join(names) if more <= 0 else f"{', '.join(names[:_MOST])} and {more:,} more"


def in_one_line(text: str, most: int = 300) -> str:
    """Return the text without line breaks, cut off after so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."
