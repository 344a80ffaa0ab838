"""A run, and the results of those that are done."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selective.compare.race import final

Record = dict[str, Any]  # plain JSON data, as `training.py` makes it
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

    @classmethod
    def read(cls, folder: Path) -> Results:
        return cls(json.loads(file.read_text()) for file in sorted(folder.glob("*/*-seed*.json")))

    def of(
        self, task: str, setup: str, lr: float | None = None, rest_lr: float | None = None, part: float = 1.0
    ) -> list[Record]:
        """The records of a setup; those at one learning rate, if one is given."""
        wanted = (task, setup, part, rest_lr)
        mine = [r for r in self.records if (r["task"], r["setup"], r["part"], r["rest_lr"]) == wanted]
        return [r for r in mine if lr in (None, r["lr"])]

    def losses(self, task: str, setup: str, rest_lr: float | None = None) -> dict[float, float]:
        """The final losses of seed 0 by learning rate; infinite where the run diverged."""
        return {r["lr"]: final(r) for r in self.of(task, setup, rest_lr=rest_lr) if r["seed"] == 0}

    def by_seed(
        self, task: str, setup: str, lr: float, rest_lr: float | None = None, part: float = 1.0
    ) -> dict[int, Record]:
        """The records at one learning rate by seed."""
        return {r["seed"]: r for r in self.of(task, setup, lr, rest_lr, part)}


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


def at_edge(losses: dict[float, float]) -> bool:
    """True if the best rate is the lowest or the highest one that was tried."""
    return best_rate(losses) in (None, min(losses), max(losses))
