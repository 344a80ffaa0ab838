"""The tables of docs/evidence.md, from the records. A row whose runs are not there says "not run"."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evidence.plan import GRIDS, LONGER
from evidence.runs import Record, Results, at_edge, best_rate
from evidence.setups import CONTROL, POLICIES, control_of
from selective.compare.intervals import Interval, t_interval
from selective.compare.race import final, race
from selective.compare.summary import paired

NOT_RUN = "not run"
NONE = "–"


@dataclass(frozen=True)
class Row:
    """A setup, the one with which it is compared, and the share of the steps that it has."""

    setup: str
    base: str
    part: float = 1.0

    @property
    def label(self) -> str:
        return self.setup if self.part == 1 else f"{self.setup}, {self.part:g} × the steps"

    @property
    def control(self) -> str | None:
        """The setup's control, if it has one. A control has none itself."""
        return control_of(self.setup) if " on " in self.setup and not self.setup.startswith(CONTROL) else None


def masked_rows(base: str) -> list[Row]:
    """A base, with more steps, and with each policy and that policy's control."""
    masked = [f"{name} on {base}" for name in POLICIES]
    with_controls = [Row(setup, base) for name in masked for setup in (name, control_of(name))]
    return [Row(base, base), Row(base, base, LONGER), *with_controls]


def said(interval: Interval, digits: int = 3, sign: str = "") -> str:
    """A mean and the half-width of its interval, if it has one."""
    half = "" if interval.half is None else f" ± {interval.half:.{digits}f}"
    return f"{interval.mean:{sign}.{digits}f}{half}".replace("-", "−")


class Comparison:
    """The rows of one task, each at its best rate."""

    def __init__(self, results: Results, task: str) -> None:
        self.results, self.task = results, task

    def rate(self, setup: str) -> float | None:
        return best_rate(self.results.losses(self.task, setup))

    def by_seed(self, row: Row) -> dict[int, Record]:
        """The row's runs by seed. A row with another share of the steps is at the rate that was best with all."""
        lr = self.rate(row.setup)
        return {} if lr is None else self.results.by_seed(self.task, row.setup, lr, part=row.part)

    def line(self, row: Row) -> str:
        """The row as a line of the table."""
        losses = self.results.losses(self.task, row.setup)
        mine = self.by_seed(row)
        if not mine:
            state = "diverged at every rate" if losses and best_rate(losses) is None else NOT_RUN
            return _line([row.label, *[NONE] * 2, state, *[NONE] * 5])
        rate = f"{self.rate(row.setup):g}{' (edge)' if at_edge(losses) else ''}"
        if any(r["diverged"] for r in mine.values()):
            return _line([row.label, rate, str(len(mine)), "a seed diverged", *[NONE] * 5])
        loss = said(t_interval([final(r) for r in mine.values()]))
        times = [_step_seconds(r) for r in mine.values() if r["alone"]]
        step = f"{1e3 * statistics.fmean(times):.1f}" if times else NONE
        return _line([row.label, rate, str(len(mine)), loss, *self._against(row, mine), step])

    def _against(self, row: Row, mine: dict[int, Record]) -> list[str]:
        """Differences from base and control, and the races against the base."""
        base = {} if row == Row(row.base, row.base) else self._finished(Row(row.base, row.base))
        control = {} if row.control is None else self._finished(Row(row.control, row.base))
        differences = [paired(mine, theirs) for theirs in (base, control)]
        cells = [NONE if d is None else said(d, sign="+") for d in differences]
        if row.control is not None and not control:
            cells[1] = f"control {NOT_RUN}"
        pairs = [(record, base[seed]) for seed, record in mine.items() if seed in base]
        alone = [pair for pair in pairs if all(record["alone"] for record in pair)]
        return [*cells, _ratio(pairs, "step"), _ratio(alone, "seconds")]

    def _finished(self, row: Row) -> dict[int, Record]:
        return {seed: record for seed, record in self.by_seed(row).items() if not record["diverged"]}


def _ratio(pairs: Sequence[tuple[Record, Record]], axis: str) -> str:
    """How many times fewer steps, or less time, the base's final loss took."""
    if not pairs:
        return NONE
    run = race(pairs, "step" if axis == "step" else "seconds")
    if run.ratio is None:
        return f"in {run.reached} of {len(pairs)} seeds"
    return said(run.ratio, 2)


def _step_seconds(record: Record) -> float:
    """The median seconds of a step, over the intervals between evaluations."""
    seconds, steps = record["seconds_to_validation"], record["validation"]["step"]
    intervals = zip(itertools.pairwise(seconds), itertools.pairwise(steps), strict=True)
    return statistics.median((b - a) / (after - before) for (a, b), (before, after) in intervals)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _head(cells: Sequence[str]) -> list[str]:
    return [_line(cells), _line(["---"] * len(cells))]


def comparison_table(results: Results, task: str, rows: Sequence[Row]) -> list[str]:
    """Each row at its best rate: loss, differences, steps and time to the base's loss, and the time of a step."""
    heads = ["setup", "best rate", "n", "final loss", "against the base", "against its control", "times fewer steps",
             "times less time", "ms a step"]  # fmt: skip
    comparison = Comparison(results, task)
    return [*_head(heads), *(comparison.line(row) for row in rows)]


def rates_table(results: Results, task: str, setups: Sequence[str], grid: Sequence[float]) -> list[str]:
    """The final losses of seed 0 at every rate that was tried."""
    losses = {setup: results.losses(task, setup) for setup in setups}
    rates = sorted({*grid, *(lr for swept in losses.values() for lr in swept)})

    def cell(swept: dict[float, float], lr: float) -> str:
        if lr not in swept:
            return ""
        said = "diverged" if swept[lr] == float("inf") else f"{swept[lr]:.3f}"
        return f"**{said}**" if lr == best_rate(swept) else said

    return [
        *_head(["setup", *(f"{lr:g}" for lr in rates)]),
        *(_line([setup, *(cell(swept, lr) or NONE for lr in rates)]) for setup, swept in losses.items()),
    ]


def _of_masks(task: str, base: str) -> dict[str, Callable[[Results], list[str]]]:
    rows = masked_rows(base)
    setups = list(dict.fromkeys(row.setup for row in rows))
    return {
        f"{task} {base}": lambda results: comparison_table(results, task, rows),
        f"{task} {base} rates": lambda results: rates_table(results, task, setups, GRIDS[base]),
    }


TABLES: dict[str, Callable[[Results], list[str]]] = {
    **_of_masks("python-34m", "AdamW"),
    **_of_masks("python-34m", "Lion"),
}
