"""The tables of docs/evidence.md, from the records. A row whose runs are not there says "not run"."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

from evidence.bases import BASES
from evidence.plan import THEIR_RATE, THEIR_STEPS, THEIRS
from evidence.rows import (
    COMPOSED,
    FINE_ROWS,
    MUON,
    PICTURE_ROWS,
    READINGS_ROWS,
    TWO_RATES,
    Row,
    masked_rows,
    short_list,
)
from evidence.runs import Point, Record, Results, at_edge, best_of_seeds, best_point, best_rate, step_seconds
from evidence.sweeps import contenders, first_rest, grid_of, open_sides
from selective.compare.intervals import Interval, t_interval
from selective.compare.race import final, race
from selective.compare.summary import paired

NOT_RUN = "not run"
NONE = "–"


def said(interval: Interval, digits: int = 3, sign: str = "") -> str:
    """A mean and the half-width of its interval, if it has one."""
    half = "" if interval.half is None else f" ± {interval.half:.{digits}f}"
    return f"{interval.mean:{sign}.{digits}f}{half}".replace("-", "−")


class Comparison:
    """The rows of one task, each at its best rate.

    With `measure`, a share that the records have besides the loss, a line ends with it in percent, and with its
    difference from the base.
    """

    def __init__(self, results: Results, task: str, measure: str | None = None) -> None:
        self.results, self.task, self.measure = results, task, measure

    def point(self, row: Row) -> Point | None:
        """The best rate, or the best pair of rates if what is no inner matrix has a rate of its own.

        Of the pairs with the most seeds that is the one with the lowest mean.
        """
        row = row.rates_of
        if not row.apart:
            return best_of_seeds(self.results, self.task, row.setup, lambda point: point[1] == first_rest(row.setup))
        point = best_of_seeds(self.results, self.task, row.setup)
        unswept = point is not None and row.tuned_apart and len(self._rests(row, point)) < 2
        return None if unswept else point

    def by_seed(self, row: Row) -> dict[int, Record]:
        """The row's runs by seed. A row with another share of the steps is at the rate that was best with all."""
        point = self.point(row)
        return {} if point is None else self._runs(row, point)

    def line(self, row: Row) -> str:
        """The row as a line of the table."""
        mine, point = self.by_seed(row), self.point(row)
        if not mine or point is None:
            tried = self.results.points(self.task, row.setup)
            state = "diverged at every rate" if tried and best_point(tried) is None else NOT_RUN
            return _line([row.label, *[NONE] * 2, state, *[NONE] * 5, *self._measured(row, {})])
        rate = self._rate(row, point)
        if any(r["diverged"] for r in mine.values()):
            return _line([row.label, rate, str(len(mine)), "a seed diverged", *[NONE] * 5, *self._measured(row, {})])
        loss = said(t_interval([final(r) for r in mine.values()]))
        times = [step_seconds(r) for r in mine.values() if r["alone"]]
        step = f"{1e3 * statistics.fmean(times):.1f}" if times else NONE
        cells = [row.label, rate, str(len(mine)), loss, *self._against(row, mine), step]
        return _line([*cells, *self._measured(row, mine)])

    def _rate(self, row: Row, point: Point) -> str:
        """The rates of a row, with a word on those that were not swept, or not to the end."""
        lr, rest = point
        plain = f"{lr:g}, rest {lr if rest is None else rest:g}" if row.apart else f"{lr:g}"
        if row.at is not None or row.part != 1:
            return f"{plain} (not swept)"
        if not row.apart:
            losses = self.results.losses(self.task, row.setup, first_rest(row.setup))
            return f"{plain} (edge)" if at_edge(losses) else plain
        points, seeds = self.results.points(self.task, row.setup), len(self._runs(row, point))
        fewer = any(len(self._runs(row, tied)) < seeds for tied in contenders(points))
        return f"{plain} (sweep unfinished)" if fewer or open_sides(points, point) else plain

    def _runs(self, row: Row, point: Point) -> dict[int, Record]:
        return self.results.by_seed(self.task, row.setup, point, row.part)

    def _rests(self, row: Row, point: Point) -> dict[float, float]:
        return self.results.rest_losses(self.task, row.setup, point[0])

    def _against(self, row: Row, mine: dict[int, Record]) -> list[str]:
        """Differences from base and control, and the races against the base."""
        base = {} if row == row.baseline else self._finished(row.baseline)
        control = {} if row.control is None else self._finished(row.control)
        differences = [paired(mine, theirs) for theirs in (base, control)]
        fewer = [f" (n = {d.n})" if d is not None and d.n < len(mine) else "" for d in differences]
        cells = [NONE if d is None else said(d, sign="+") + few for d, few in zip(differences, fewer, strict=True)]
        if row.control is not None and not control:
            cells[1] = f"control {NOT_RUN}"
        pairs = [(record, base[seed]) for seed, record in mine.items() if seed in base]
        alone = [pair for pair in pairs if all(record["alone"] for record in pair)]
        return [*cells, _ratio(pairs, "step"), _ratio(alone, "seconds")]

    def _measured(self, row: Row, mine: dict[int, Record]) -> list[str]:
        """The measure in percent, and its difference from the base in points, paired by seed; nothing without one."""
        if self.measure is None:
            return []
        base = {} if row == row.baseline else self._finished(row.baseline)
        values, others = (self._percent(records) for records in (mine, base))
        differences = [values[seed] - others[seed] for seed in values if seed in others]
        return [
            said(t_interval(list(values.values())), 2) if values else NONE,
            said(t_interval(differences), 2, sign="+") if differences else NONE,
        ]

    def _percent(self, records: dict[int, Record]) -> dict[int, float]:
        """The measure by seed, of the records that have it."""
        measures = {seed: record.get("measures", {}).get(self.measure) for seed, record in records.items()}
        return {seed: 100 * value for seed, value in measures.items() if value is not None}

    def _finished(self, row: Row) -> dict[int, Record]:
        return {seed: record for seed, record in self.by_seed(row).items() if not record["diverged"]}


def _ratio(pairs: Sequence[tuple[Record, Record]], axis: str) -> str:
    """The factor of fewer steps, or of less time, that the base's final loss took."""
    if not pairs:
        return NONE
    run = race(pairs, "step" if axis == "step" else "seconds")
    if run.ratio is None:
        return f"in {run.reached} of {len(pairs)} seeds"
    return said(run.ratio, 2)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _head(cells: Sequence[str]) -> list[str]:
    return [_line(cells), _line(["---"] * len(cells))]


def comparison_table(results: Results, task: str, rows: Sequence[Row], measure: str | None = None) -> list[str]:
    """Each row at its best rate: loss, differences, steps and time to the base's loss, and the time of a step.

    With `measure`, also what the records have besides the loss, such as accuracy.
    """
    heads = ["setup", "best rate", "n", "final loss", "against the base", "against its control", "times fewer steps",
             "times less time", "ms a step"]  # fmt: skip
    comparison = Comparison(results, task, measure)
    if measure is not None:
        heads += [f"{measure}, %", f"{measure} against the base"]
    return [*_head(heads), *(comparison.line(row) for row in rows)]


def rates_table(results: Results, task: str, setups: Sequence[str], grid: Sequence[float]) -> list[str]:
    """The final losses of seed 0 at every rate that was tried."""
    losses = {setup: results.losses(task, setup, first_rest(setup)) for setup in setups}
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


def their_table(results: Results) -> list[str]:
    """MGUP's own setting: one rate for all bases, one seed, and the difference from the same base without MGUP."""
    task, part = "english-34m-256", THEIR_STEPS
    losses = {setup: [final(r) for r in results.of(task, setup, part) if r["seed"] == 0] for setup in THEIRS}
    lines = _head(["setup", "rate", "final loss", "against the base"])
    for setup, mine in losses.items():
        base = [] if setup in BASES else losses[setup.rpartition(" on ")[2]]
        difference = f"{mine[0] - base[0]:+.3f}".replace("-", "−") if mine and base else NONE
        lines.append(_line([setup, f"{THEIR_RATE:g}", f"{mine[0]:.3f}" if mine else NOT_RUN, difference]))
    return lines


def _of_rows(task: str, name: str, rows: Sequence[Row]) -> dict[str, Callable[[Results], list[str]]]:
    setups = list(dict.fromkeys(row.setup for row in rows if row.at is None))
    grid = grid_of(setups[0])
    return {
        f"{task} {name}": lambda results: comparison_table(results, task, rows),
        f"{task} {name} rates": lambda results: rates_table(results, task, setups, grid),
    }


TABLES: dict[str, Callable[[Results], list[str]]] = {
    **_of_rows("python-34m", "AdamW", masked_rows("AdamW")),
    **_of_rows("python-34m", "Lion", masked_rows("Lion")),
    **_of_rows("python-34m", "composed", COMPOSED),
    **_of_rows("python-34m", "two rates", TWO_RATES),
    **_of_rows("python-34m", "Muon", MUON),
    **_of_rows("python-34m", "readings", READINGS_ROWS),
    "mgup's setting": their_table,
    "foldoc-minilm": lambda results: comparison_table(results, "foldoc-minilm", FINE_ROWS, "accuracy"),
    "pictures-mae": lambda results: comparison_table(results, "pictures-mae", PICTURE_ROWS),
    **{
        task: partial(lambda task, results: comparison_table(results, task, short_list(results)), task)
        for task in ("python-110m", "english-34m", "english-110m")
    },
}
