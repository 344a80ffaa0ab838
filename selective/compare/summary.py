"""The summary of all runs: a row for each contender and learning rate, and a verdict for each policy.

Only seeds that no run is missing from count, so that differences are paired. A run that failed is not missing: its row
rests on the other seeds. A contender's learning rate is the one with the lowest mean final loss among those swept; with
second learning rates it is the best pair.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, median
from typing import Any

from selective.compare.config import CompareConfig
from selective.compare.contenders import Contender, Pair, contenders
from selective.compare.intervals import Interval, t_interval
from selective.compare.notes import at_an_edge, notes_on
from selective.compare.race import final, race
from selective.compare.train import Record

BySeed = Mapping[int, Record]
"""The finished runs of a contender at one pair of learning rates."""


@dataclass(frozen=True)
class Row:
    """A contender at one learning rate, over the seeds that count. Numbers that can't be known are None."""

    contender: Contender
    lr: float
    best: bool  # the best of its contender's learning rates
    diverged: int  # seeds whose loss stopped being finite
    loss: Interval | None  # final held-out loss, in the task's unit
    difference: Interval | None  # from the baseline's loss at its best learning rate, seed by seed
    steps: float | None  # mean number of steps to the baseline's final loss of the same seed
    speed: Interval | None  # the baseline's steps to that loss over these, seed by seed; None unless all reached it
    reached: int  # seeds that reached that loss
    step_ms: float  # median time of one optimizer step
    rest_lr: float | None = None  # the second learning rate
    failed: int = 0  # seeds whose run failed
    seconds: float | None = None  # mean time of training to the baseline's final loss of the same seed
    time_speed: Interval | None = None  # the baseline's time to that loss over these, seed by seed, as `speed`

    @property
    def pair(self) -> Pair:
        return self.lr, self.rest_lr


@dataclass(frozen=True)
class Effect:
    """Differences in final loss of a contender, paired by seed, each side at its own best learning rate.

    A difference is None if one side diverged or failed at every learning rate.
    """

    contender: Contender
    base: Contender  # its rival: the base in the same space; for a rotation or an optimizer, the baseline
    against_base: Interval | None
    against_control: Interval | None
    diverged: bool  # the contender itself diverged at every learning rate
    at_edge: bool  # `base` is best at the lowest or highest of several learning rates
    speed: Interval | None  # `Row.speed` at its best learning rate
    n: int  # seeds
    time_speed: Interval | None = None  # `Row.time_speed` at its best learning rate
    failed: bool = False  # all of the contender's runs failed
    base_failed: bool = False  # runs of `base` failed, so that no seed has both
    control_failed: bool = False  # the same of the random control


@dataclass(frozen=True)
class Summary:
    """The results of a comparison: a row for each contender and learning rate, and a verdict for each policy."""

    seeds: tuple[int, ...]  # that count, because no run of them is missing
    rows: tuple[Row, ...]
    found: tuple[Effect, ...]  # the effect of each policy, each rotation and each optimizer
    verdicts: tuple[tuple[str, str], ...]  # (label of the contender, sentence)
    notes: tuple[str, ...]


def summarise(config: CompareConfig, records: Sequence[Record]) -> Summary:
    """Summarise the runs that are done so far. Without a seed of which no run is missing there are no rows."""
    field = contenders(config)
    table = {(r["contender"], (r["lr"], r.get("rest_lr")), r["seed"]): r for r in records if _settled(r)}
    seeds = tuple(s for s in config.seeds if all((c.index, pair, s) in table for c in field for pair in c.pairs))
    if not seeds:
        return Summary((), (), (), (), ())
    cells = {(c.index, pair): _finished(table, c.index, pair, seeds) for c in field for pair in c.pairs}
    best = {c.index: _best_pair({pair: cells[c.index, pair] for pair in c.pairs}) for c in field}
    baseline = cells[0, best[0]] if best[0] is not None else None
    rows = tuple(
        _row(c, pair, cells[c.index, pair], len(seeds), pair == best[c.index], baseline)
        for c in field
        for pair in c.pairs
    )
    best_rows = {row.contender.index: row for row in rows if row.best}
    asked = [c for c in field if c.role in ("policy", "rotation", "optimizer")]
    effects = tuple(_effect(c, field, cells, best, best_rows.get(c.index), len(seeds)) for c in asked)
    verdicts = tuple((effect.contender.label, _verdict(effect)) for effect in effects)
    failed = [r for r in table.values() if r.get("failed")]
    return Summary(seeds, rows, effects, verdicts, tuple(notes_on(config, field, best, len(seeds), failed)))


def _settled(record: Record) -> bool:
    return record["complete"] or bool(record.get("failed"))


def _finished(table: Mapping[Any, Record], index: int, pair: Pair, seeds: Sequence[int]) -> BySeed:
    of_pair = {seed: table[index, pair, seed] for seed in seeds}
    return {seed: record for seed, record in of_pair.items() if record["complete"]}


def as_json(summary: Summary) -> dict[str, Any]:
    """The summary as plain JSON data. Contenders are given by index; numbers that can't be known are None."""
    rows = []
    for row in summary.rows:
        entry = {**asdict(row), "contender": row.contender.index}
        entry["step_ms"] = None if math.isnan(row.step_ms) else row.step_ms
        rows.append(entry)
    verdicts = [{"policy": policy, "says": sentence} for policy, sentence in summary.verdicts]
    return {"seeds": summary.seeds, "rows": rows, "verdicts": verdicts, "notes": summary.notes}


def _best_pair(swept: Mapping[Pair, BySeed]) -> Pair | None:
    """The learning rates with the lowest mean final loss; None if each has a seed that diverged, or no run finished.

    Means are taken over the seeds that all rates finished, if there are any.
    """
    tried = {pair: records for pair, records in swept.items() if records}
    if not tried:
        return None
    common = set.intersection(*(set(records) for records in tried.values()))

    def mean(records: BySeed) -> float:
        if any(r["diverged"] for r in records.values()):
            return math.inf
        return fmean(final(r) for seed, r in records.items() if seed in common or not common)

    loss, lr, rest = min((mean(records), lr, -1.0 if rest is None else rest) for (lr, rest), records in tried.items())
    return (lr, None if rest == -1.0 else rest) if math.isfinite(loss) else None


def _row(
    c: Contender, pair: Pair, records: BySeed, seeds: int, best: bool, baseline: BySeed | None
) -> Row:  # fmt: skip
    times = [ms for r in records.values() for ms in r["optimizer_ms"]]
    diverged = sum(r["diverged"] for r in records.values())
    row = Row(
        c, pair[0], best, diverged, None, None, None, None, 0, median(times) if times else math.nan,
        rest_lr=pair[1], failed=seeds - len(records),
    )  # fmt: skip
    if diverged or not records:
        return row
    row = replace(row, loss=t_interval([final(r) for r in records.values()]))
    pairs = [(records[seed], baseline[seed]) for seed in records if baseline and seed in baseline]
    if not pairs:
        return row
    steps = race(pairs, "step")
    seconds = race(pairs, "seconds")
    return replace(
        row, difference=t_interval([final(r) - final(b) for r, b in pairs]), steps=steps.mean, speed=steps.ratio,
        reached=steps.reached, seconds=seconds.mean, time_speed=seconds.ratio,
    )  # fmt: skip


def paired(left: BySeed, right: BySeed) -> Interval | None:
    """The mean over seeds of the difference in final loss. Pairing by seed cancels what both owe to the seed.

    None if no seed has both.
    """
    differences = [final(left[seed]) - final(right[seed]) for seed in left if seed in right]
    return t_interval(differences) if differences else None


def _effect(
    c: Contender,
    field: Sequence[Contender],
    cells: Mapping[Any, BySeed],
    best: Mapping[int, Pair | None],
    row: Row | None,
    seeds: int,
) -> Effect:
    """The effect of a policy against the base in its space and its control, of all others against the baseline."""
    base = field[0 if c.role == "rotation" else c.ground]
    own = best[c.index]

    def against(index: int) -> Interval | None:
        rival = best[index]
        return None if rival is None or own is None else paired(cells[c.index, own], cells[index, rival])

    def has_failed(index: int, difference: Interval | None) -> bool:
        return difference is None and any(len(cells[index, pair]) < seeds for pair in field[index].pairs)

    against_base, control = against(base.index), None if c.of is None else against(c.of)
    failed = not any(cells[c.index, pair] for pair in c.pairs)
    return Effect(
        contender=c,
        base=base,
        against_base=against_base,
        against_control=control,
        diverged=own is None and not failed,
        at_edge=at_an_edge(base, best[base.index]),
        speed=None if row is None else row.speed,
        n=seeds if against_base is None else against_base.n,
        time_speed=None if row is None else row.time_speed,
        failed=failed,
        base_failed=has_failed(base.index, against_base),
        control_failed=c.of is not None and has_failed(c.of, control),
    )


def _verdict(effect: Effect) -> str:
    """The verdict on a policy, a rotation or an optimizer, from paired intervals."""
    if effect.failed:
        return "all of its runs failed."
    if effect.diverged:
        return "diverged at every learning rate."
    name = effect.base.label
    rivals = [(name, effect.against_base, effect.base_failed)]
    if effect.contender.of is not None:
        rivals.append(("its random control", effect.against_control, effect.control_failed))
    if effect.n == 1:
        seen = ", ".join(f"{d.mean:+.4f} against {name}" for name, d, _ in rivals if d is not None)
        return f"no verdict from one seed ({seen}); run at least three."
    signs = [d.sign if d is not None else -(not failed) for _, d, failed in rivals]
    text = "; ".join(_clause(*rival) for rival in rivals) + "."
    if len(rivals) == 2 and signs[1] != -1 and signs[0] == -1:
        text += " So the gain is not shown to come from which coordinates are selected."
    if len(rivals) == 2 and signs == [-1, -1]:
        text += f" So selection helped here, at n = {effect.n}"
        text += f" and these learning rates ({name} is best at the edge of them)." if effect.at_edge else "."
    if len(rivals) == 2 and signs[0] == 0 and signs[1] == -1:
        text += f" So which coordinates are selected matters, but a gain over {name} is not shown at this n."
    return text


def _clause(name: str, difference: Interval | None, failed: bool) -> str:
    if difference is None:
        return f"{name} failed" if failed else f"{name} diverged at every learning rate"
    word = {-1: "beats", 0: "no difference shown from", 1: "is worse than"}[difference.sign]
    return f"{word} {name} ({difference.signed()}, n = {difference.n})"
