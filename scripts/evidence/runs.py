"""A run, and the results of those that are done."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selective.compare.race import final

Record = dict[str, Any]  # plain JSON data, as `training.py` makes it
Point = tuple[float, float | None]  # `lr` and `rest_lr` of a run
MOST_RATES = 10  # of a sweep, which goes on while its best rate is at an edge


@dataclass(frozen=True)
class Run:
    """One training run.

    `lr` is the peak learning rate, `rest_lr` that of embeddings, head and vectors, if it is another. `part` is the
    share of the steps that the run has, at whose end the schedule ends, too.
    """

    task: str
    setup: str
    lr: float
    seed: int = 0
    rest_lr: float | None = None
    part: float = 1.0

    @property
    def file(self) -> str:
        plain = "".join(c if c.isalnum() or c in "+-" else "-" for c in self.setup)
        rest = "" if self.rest_lr is None else f"-rest{self.rest_lr:g}"
        part = "" if self.part == 1 else f"-part{self.part:g}"
        return f"{self.task}/{plain}-lr{self.lr:g}{rest}-seed{self.seed}{part}.json"


class Results:
    """All records of a folder."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = list(records)
        self._of: dict[tuple[str, str, float], list[Record]] = {}
        for record in self.records:
            self._of.setdefault((record["task"], record["setup"], record["part"]), []).append(record)

    @classmethod
    def read(cls, folder: Path) -> Results:
        return cls(json.loads(file.read_text()) for file in sorted(folder.glob("*/*-seed*.json")))

    def of(self, task: str, setup: str, part: float = 1.0) -> list[Record]:
        """The records of a setup at all rates, of runs with this share of the steps."""
        return self._of.get((task, setup, part), [])

    def points(self, task: str, setup: str) -> dict[Point, float]:
        """The final losses of seed 0 by both learning rates; infinite where the run diverged."""
        return {(r["lr"], r["rest_lr"]): final(r) for r in self.of(task, setup) if r["seed"] == 0}

    def losses(self, task: str, setup: str, rest_lr: float | None = None) -> dict[float, float]:
        """The final losses of seed 0 by learning rate, where what is no inner matrix has the rate `rest_lr`.

        None: the rate of the matrices.
        """
        points = self.points(task, setup).items()
        return {lr: loss for (lr, rest), loss in points if rest == rest_lr}

    def rest_losses(self, task: str, setup: str, lr: float) -> dict[float, float]:
        """The final losses of seed 0 by the rate of what is no inner matrix; the matrices have the rate `lr`."""
        points = self.points(task, setup).items()
        return {lr if rest is None else rest: loss for (rate, rest), loss in points if rate == lr}

    def by_seed(self, task: str, setup: str, point: Point, part: float = 1.0) -> dict[int, Record]:
        """The records at a pair of learning rates by seed."""
        return {r["seed"]: r for r in self.of(task, setup, part) if (r["lr"], r["rest_lr"]) == point}


def next_rates(losses: dict[float, float], grid: Sequence[float]) -> list[float]:
    """The learning rates that a sweep still needs: those of the grid, and then the next one beyond an edge.

    A sweep is done if its best rate has a worse one on either side, if it has `MOST_RATES` rates, or if it went down
    so far without a run that did not diverge.
    """
    missing = [lr for lr in grid if lr not in losses]
    if missing or len(losses) >= MOST_RATES:
        return missing
    lr = best_rate(losses)
    if lr is None or lr == min(losses):
        return [min(losses) / 2]
    return [2 * lr] if lr == max(losses) else []


def best_rate(losses: dict[float, float]) -> float | None:
    """The learning rate with the lowest loss. None if there is none, or if all runs diverged."""
    loss, lr = min(((loss, lr) for lr, loss in losses.items()), default=(math.inf, 0.0))
    return lr if math.isfinite(loss) else None


def best_point(points: Mapping[Point, float]) -> Point | None:
    """The pair of learning rates with the lowest loss. None if there is none, or if all runs diverged."""
    losses = [(loss, lr, rest) for (lr, rest), loss in points.items() if math.isfinite(loss)]
    return min(losses, key=lambda entry: entry[:2])[1:] if losses else None


def best_of_seeds(
    results: Results, task: str, setup: str, only: Callable[[Point], bool] = lambda _: True
) -> Point | None:
    """Of the pairs of rates with the most seeds, the one with the lowest mean loss over them.

    None if there is none that did not diverge with seed 0.
    """
    first = results.points(task, setup)
    runs = {p: results.by_seed(task, setup, p) for p, loss in first.items() if only(p) and math.isfinite(loss)}
    most = max(map(len, runs.values()), default=0)
    means = {p: statistics.fmean(map(final, by_seed.values())) for p, by_seed in runs.items() if len(by_seed) == most}
    return min(means, key=lambda p: (means[p], first[p], p[0])) if means else None


def at_edge(losses: dict[float, float]) -> bool:
    """True if the best rate is the lowest or the highest one that was tried."""
    return best_rate(losses) in (None, min(losses), max(losses))


def step_seconds(record: Record) -> float:
    """The median seconds of a step, over the intervals between evaluations."""
    seconds, steps = record["seconds_to_validation"], record["validation"]["step"]
    intervals = zip(itertools.pairwise(seconds), itertools.pairwise(steps), strict=True)
    return statistics.median((b - a) / (after - before) for (a, b), (before, after) in intervals)
