"""The ranking of setups by their final loss over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from evidence.runs import Results, best_of_seeds
from evidence.sweeps import SEEDS
from selective.compare.race import final


def mean_loss(results: Results, task: str, setup: str) -> float:
    """The mean final loss of a setup at its best rates. Infinite if a seed diverged, or is missing."""
    point = best_of_seeds(results, task, setup)
    runs = {} if point is None else results.by_seed(task, setup, point)
    return statistics.fmean(final(r) for r in runs.values()) if runs.keys() >= set(SEEDS) else math.inf


def best_setups(results: Results, task: str, families: Sequence[Sequence[str]], count: int) -> list[str]:
    """The setups with the lowest mean losses, at most one of each family, the best one first.

    There may be fewer that have all seeds.
    """
    losses = sorted(min((mean_loss(results, task, setup), setup) for setup in family) for family in families)
    return [setup for loss, setup in losses if math.isfinite(loss)][:count]
