"""The first line of a paragraph on parameter groups: their numbers, their names, and how much is in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from selective.parameter import initialized

_MOST = 6  # names


def title_of(groups: Mapping[int, Mapping[str, Any]]) -> str:
    """Return the title of the paragraph on these groups, which are given by their numbers."""
    params = [p for group in groups.values() for p in group["params"]]
    shaped = initialized(params)
    count, without = sum(p.numel() for p in shaped), len(params) - len(shaped)
    names = [str(group["name"]) for group in groups.values() if "name" in group]
    named = f" ({', '.join(names[:_MOST])}{', ...' if len(names) > _MOST else ''})" if names else ""
    more = f", and {_count(without, 'tensor')} without a shape yet" if without else ""
    what = f"{_count(len(params), 'tensor')}, {_count(count, 'element')}"
    return f"param_groups{_numbers(list(groups))}{named}: {what}{more}"


def _numbers(numbers: Sequence[int]) -> str:
    """Return "[0], [2] to [5]"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = []
    for run in runs:
        texts += [f"[{run[0]}] to [{run[-1]}]"] if len(run) > 2 else [f"[{number}]" for number in run]
    return ", ".join(texts)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
