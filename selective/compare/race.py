"""A race: the way of runs to the final loss of another run with the same seed, in steps or in seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from selective.compare.intervals import Interval, steps_to, t_interval

Record = Mapping[str, Any]
"""A run, as `train.new_record` describes it: `diverged`, `validation` and `seconds_to_validation` are read."""


def final(record: Record) -> float:
    """The last held-out loss of a run, or infinity if it diverged."""
    return math.inf if record["diverged"] else record["validation"]["loss"][-1]


@dataclass(frozen=True)
class Race:
    """The way to the baseline's final loss of the same seed, in steps or in seconds."""

    mean: float | None  # over the seeds that reached it
    ratio: Interval | None  # the baseline's way over this one; None unless all seeds reached it
    reached: int


def race(pairs: Sequence[tuple[Record, Record]], axis: Literal["step", "seconds"]) -> Race:
    """Race runs, each paired with the baseline's of the same seed, along the steps or the seconds of their curves."""
    if any(None in _axis(record, axis) for pair in pairs for record in pair):
        return Race(None, None, 0)
    ways = [_way(r, final(b), axis) for r, b in pairs]
    there = [way for way in ways if way is not None]
    ratio = None
    if len(there) == len(ways) and all(way > 0 for way in there):
        taken = [_way(b, final(b), axis) for _, b in pairs]
        ratio = t_interval([base / way for base, way in zip(taken, there, strict=True) if base is not None])
    return Race(fmean(there) if there else None, ratio, len(there))


def _way(record: Record, target: float, axis: str) -> float | None:
    return steps_to(target, _axis(record, axis), record["validation"]["loss"])


def _axis(record: Record, axis: str) -> Sequence[Any]:
    """The steps of the evaluations, or the seconds of training until each; [None] if these were not recorded."""
    return record["validation"]["step"] if axis == "step" else record.get("seconds_to_validation") or [None]
