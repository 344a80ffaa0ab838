"""The summary of all runs: a row for each contender and learning rate, and a verdict for each policy.

Only seeds that *every* contender finished at *every* learning rate count, so that all rows rest on the same batches
and differences are paired. A contender's learning rate is the one with the lowest mean final loss among those swept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from selective.compare.config import CompareConfig
from selective.compare.contenders import Contender, contenders
from selective.compare.intervals import Interval, steps_to, t_interval
from selective.compare.train import Record


@dataclass(frozen=True)
class Row:
    """A contender at one learning rate, over the seeds that count. Numbers that can't be known are None."""

    contender: Contender
    lr: float
    best: bool  # the best of its contender's learning rates
    diverged: int  # seeds whose loss stopped being finite
    loss: Interval | None  # final held-out loss, nats per byte
    difference: Interval | None  # from the baseline's loss at its best learning rate, seed by seed
    steps: float | None  # mean number of steps to the baseline's final loss of the same seed
    speed: Interval | None  # the baseline's steps to that loss over these, seed by seed; None unless all reached it
    reached: int  # seeds that reached that loss
    step_ms: float  # median time of one optimizer step


@dataclass(frozen=True)
class Effect:
    """Differences in final loss of a policy or a rotation, paired by seed, each side at its own best learning rate.

    A difference is None if one side diverged at every learning rate.
    """

    contender: Contender
    base: Contender  # its rival: the base in the same space; for a rotation, the baseline
    against_base: Interval | None
    against_control: Interval | None
    diverged: bool  # the contender itself diverged at every learning rate
    at_edge: bool  # `base` is best at the lowest or highest of several learning rates
    speed: Interval | None  # `Row.speed` at its best learning rate
    n: int  # seeds


@dataclass(frozen=True)
class Summary:
    """The results of a comparison: a row for each contender and learning rate, and a verdict for each policy."""

    seeds: tuple[int, ...]  # that count, because every contender finished them
    rows: tuple[Row, ...]
    found: tuple[Effect, ...]  # the effect of each policy and each rotation
    verdicts: tuple[tuple[str, str], ...]  # (policy, sentence)
    notes: tuple[str, ...]


def summarise(config: CompareConfig, records: Sequence[Record]) -> Summary:
    """Summarise the runs that are done so far. Without a seed that every contender finished there are no rows."""
    table = {(r["contender"], r["lr"], r["seed"]): r for r in records if r["complete"]}
    field = contenders(config)
    seeds = tuple(s for s in config.seeds if all((c.index, lr, s) in table for c in field for lr in c.rates))
    if not seeds:
        return Summary((), (), (), (), ())
    cells = {(c.index, lr): [table[c.index, lr, seed] for seed in seeds] for c in field for lr in c.rates}
    best = {c.index: _best_lr([(lr, cells[c.index, lr]) for lr in c.rates]) for c in field}
    baseline = cells[0, best[0]] if best[0] is not None else None
    rows = tuple(_row(c, lr, cells[c.index, lr], lr == best[c.index], baseline) for c in field for lr in c.rates)
    speeds = {row.contender.index: row.speed for row in rows if row.best}
    asked = [c for c in field if c.role in ("policy", "rotation")]
    effects = tuple(_effect(c, field, cells, best, speeds.get(c.index)) for c in asked)
    verdicts = tuple((effect.contender.label, _verdict(effect)) for effect in effects)
    return Summary(seeds, rows, effects, verdicts, tuple(_notes(config, field, best, len(seeds))))


def as_json(summary: Summary) -> dict[str, Any]:
    """The summary as plain JSON data. Contenders are given by index; numbers that can't be known are None."""
    rows = []
    for row in summary.rows:
        entry = {**asdict(row), "contender": row.contender.index}
        entry["step_ms"] = None if math.isnan(row.step_ms) else row.step_ms
        rows.append(entry)
    verdicts = [{"policy": policy, "says": sentence} for policy, sentence in summary.verdicts]
    return {"seeds": summary.seeds, "rows": rows, "verdicts": verdicts, "notes": summary.notes}


def final(record: Record) -> float:
    """The last held-out loss of a run, or infinity if it diverged."""
    return math.inf if record["diverged"] else record["validation"]["loss"][-1]


def _best_lr(swept: Sequence[tuple[float, Sequence[Record]]]) -> float | None:
    """The learning rate with the lowest mean final loss; None if every rate has a seed that diverged."""
    mean, lr = min((fmean(final(r) for r in records), lr) for lr, records in swept)
    return lr if math.isfinite(mean) else None


def _row(c: Contender, lr: float, records: Sequence[Record], best: bool, baseline: Sequence[Record] | None) -> Row:
    times = [ms for r in records for ms in r["optimizer_ms"]]
    step_ms = median(times) if times else math.nan
    diverged = sum(r["diverged"] for r in records)
    if diverged:
        return Row(c, lr, best, diverged, None, None, None, None, 0, step_ms)
    loss = t_interval([final(r) for r in records])
    if baseline is None:
        return Row(c, lr, best, 0, loss, None, None, None, 0, step_ms)
    reached = [
        steps_to(final(b), r["validation"]["step"], r["validation"]["loss"])
        for r, b in zip(records, baseline, strict=True)
    ]
    there = [steps for steps in reached if steps is not None]
    speed = None
    if len(there) == len(records) and all(steps > 0 for steps in there):
        taken = [steps_to(final(b), b["validation"]["step"], b["validation"]["loss"]) for b in baseline]
        speed = t_interval(
            [
                baseline_steps / steps
                for baseline_steps, steps in zip(taken, there, strict=True)
                if baseline_steps is not None
            ]
        )
    steps = fmean(there) if there else None
    return Row(c, lr, best, 0, loss, paired(records, baseline), steps, speed, len(there), step_ms)


def paired(left: Sequence[Record], right: Sequence[Record]) -> Interval:
    """The mean over seeds of the difference in final loss. Pairing by seed cancels what both owe to the seed."""
    return t_interval([final(a) - final(b) for a, b in zip(left, right, strict=True)])


def _effect(
    c: Contender,
    field: Sequence[Contender],
    cells: dict[Any, list[Record]],
    best: dict[int, float | None],
    speed: Interval | None,
) -> Effect:
    """The effect of a policy against the base in its space and its control, or of a rotation against the baseline."""
    base = field[0 if c.role == "rotation" else c.ground]
    own_lr, swept = best[c.index], base.rates
    n = len(cells[c.index, c.rates[0]])

    def against(index: int) -> Interval | None:
        lr = best[index]
        return None if lr is None or own_lr is None else paired(cells[c.index, own_lr], cells[index, lr])

    control = None if c.of is None else against(c.of)
    edge = len(swept) > 1 and best[base.index] in (min(swept), max(swept))
    return Effect(c, base, against(base.index), control, own_lr is None, edge, speed, n)


def _verdict(effect: Effect) -> str:
    """The verdict on a policy or a rotation, from paired intervals."""
    if effect.diverged:
        return "diverged at every learning rate."
    name = effect.base.label
    rivals = [(name, effect.against_base)]
    if effect.contender.of is not None:
        rivals.append(("its random control", effect.against_control))
    if effect.n == 1:
        seen = ", ".join(f"{d.mean:+.4f} against {name}" for name, d in rivals if d is not None)
        return f"no verdict from one seed ({seen}); run at least three."
    signs = [d.sign if d is not None else -1 for _, d in rivals]
    text = "; ".join(_clause(name, d) for name, d in rivals) + "."
    if len(rivals) == 2 and signs[1] != -1 and signs[0] == -1:
        text += " So the gain is not shown to come from which coordinates are selected."
    if len(rivals) == 2 and signs == [-1, -1]:
        text += f" So selection helped here, at n = {effect.n}"
        text += f" and these learning rates ({name} is best at the edge of them)." if effect.at_edge else "."
    if len(rivals) == 2 and signs[0] == 0 and signs[1] == -1:
        text += f" So which coordinates are selected matters, but a gain over {name} is not shown at this n."
    return text


def _clause(name: str, difference: Interval | None) -> str:
    if difference is None:
        return f"{name} diverged at every learning rate"
    word = {-1: "beats", 0: "no difference shown from", 1: "is worse than"}[difference.sign]
    return f"{word} {name} ({difference.signed()}, n = {difference.n})"


def _notes(config: CompareConfig, field: Sequence[Contender], best: dict[int, float | None], n: int) -> list[str]:
    notes = []
    if n < len(config.seeds):
        notes.append(f"{n} of {len(config.seeds)} seeds are complete; the others are left out. --resume goes on.")
    if all(len(c.rates) == 1 for c in field):
        notes.append(
            "One learning rate: a policy that changes the size of the update changes the learning rate in disguise. "
            "Sweep it with --lr."
        )
    else:
        notes += _notes_on_rates(field, best)
    policies = sum(c.role == "policy" for c in field)
    if policies > 1 and n > 1:
        notes.append(
            f"Intervals are 95 % each, not adjusted for {policies} policies being compared, nor for choosing the "
            "learning rate by the same losses."
        )
    return notes


def _notes_on_rates(field: Sequence[Contender], best: dict[int, float | None]) -> list[str]:
    """Notes on contenders that were best at an end of their sweep, or had one learning rate only."""
    notes = []
    swept = [c for c in field if len(c.rates) > 1]
    for word, end in (("lowest", min), ("highest", max)):
        for edge in sorted({end(c.rates) for c in swept}):
            names = [c.label for c in swept if end(c.rates) == edge and best[c.index] == edge]
            if names:
                notes.append(
                    f"Best at the {word} learning rate swept, {edge:g}: {', '.join(names)}. A better one may lie "
                    "beyond it."
                )
    single = [f"{c.label} ({c.rates[0]:g})" for c in field if len(c.rates) == 1]
    if single:
        notes.append(f"At one learning rate only, which was fixed beforehand: {', '.join(single)}.")
    return notes
