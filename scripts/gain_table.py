"""Writes the results of `gain.py` as tables."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from evidence.runs import step_seconds
from gain_plan import best, final, results

from selective.compare.intervals import steps_to, t_interval

Records = list[dict[str, Any]]
BASES = ("AdamW", "Adafactor")


def table(folder: Path) -> str:
    """All tables for which there are runs."""
    everything = results(folder)
    done = [r for r in everything if r["part"] == 1]
    lines: list[str] = []
    for base in BASES:
        lines += _at_best_rates(done, [s for s in dict.fromkeys(r["setup"] for r in done) if _base(s) == base], base)
    lines += [*_over_seeds(done), *_times(done), *_shorter(done, [r for r in everything if r["part"] != 1])]
    return "\n".join(lines).lstrip()


def _base(setup: str) -> str:
    """The setup with whose final loss `setup` is compared."""
    return "Adafactor" if setup.startswith("Adafactor") else "AdamW"


def _head(*columns: str) -> list[str]:
    return ["", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]


def _at_best_rates(done: Records, setups: list[str], base: str) -> list[str]:
    """A table of setups at their best rates, with final loss, steps to the base's final loss, time and other rates."""
    _, wanted = best(done, base)
    lines = []
    for setup in setups:
        lr, loss = best(done, setup)
        mine = [r for r in done if r["setup"] == setup and r["seed"] == 0]
        if math.isnan(lr):
            continue  # no run with seed 0 yet
        first = next(r for r in mine if r["lr"] == lr)
        steps = _steps(first, wanted) if math.isfinite(wanted) else None
        reached = "–" if steps is None else f"{steps:.0f} of {first['steps']}"
        others = ", ".join(f"{r['lr']:g}: {final(r):.3f}" for r in mine if r["lr"] != lr)
        lines.append(f"| {setup} | {lr:g} | {loss:.3f} | {reached} | {first['seconds']:.0f} | {others} |")
    heads = _head("setup", "best lr", "final loss", f"steps to {base}'s", "s a run", "other rates")
    return [*heads, *lines] if lines else []


def _over_seeds(done: Records) -> list[str]:
    """A table of the setups that have several seeds, paired by seed with others.

    It has means and 95 % intervals of the loss, of the differences, and of the factor by which fewer steps were needed
    to the final loss of AdamW with the same seed.
    """
    adamw = _adamw(done)
    lines = []
    for setup in dict.fromkeys(r["setup"] for r in done):
        lr = best(done, setup)[0]
        mine = [r for r in done if r["setup"] == setup and r["lr"] == lr and r["seed"] in adamw]
        if len(mine) < 2:
            continue
        losses = _differences(mine, adamw)
        if losses is None:
            lines.append(f"| {setup} | {lr:g} | {len(mine)} | a run, or AdamW's with its seed, diverged | | | | |")
            continue
        for other in (setup.rpartition(" in ")[2], f"random like {setup}"):
            theirs = {} if other == setup else _by_seed(done, other, lr)
            pairs = [r for r in mine if r["seed"] in theirs]
            both = _differences(pairs, theirs) if pairs else None
            losses.append("" if both is None else both[1])
        steps = [_steps(r, final(adamw[r["seed"]])) for r in mine]
        reached = [r["steps"] / s for s, r in zip(steps, mine, strict=True) if s]  # 0: no better than at the start
        fewer = f"{t_interval(reached)} ({len(reached)} of {len(mine)})" if reached else "not reached"
        lines.append(f"| {setup} | {lr:g} | {len(mine)} | {' | '.join(losses)} | {fewer} |")
    heads = _head("setup", "lr", "seeds", "final loss", "against AdamW", "against its space", "against its control",
                  "times fewer steps")  # fmt: skip
    return [*heads, *lines] if lines else []


def _times(done: Records) -> list[str]:
    """A table of times to the final loss of AdamW with the same seed, over AdamW's own time, evaluations left out.

    Once they are those of the runs themselves, and once the number of steps times the median time of a step, which
    compiling does not count in. Only runs that recorded their times are in it.
    """
    timed = [r for r in done if r["seconds_to_validation"] and len(r["validation"]["loss"]) > 1]
    adamw = _adamw(timed)
    lines = []
    for setup in dict.fromkeys(r["setup"] for r in timed):
        lr = best(timed, setup)[0]
        mine = [r for r in timed if r["setup"] == setup and r["lr"] == lr and r["seed"] in adamw]
        pairs = [(r, adamw[r["seed"]]) for r in mine]
        reached = [(r, base) for r, base in pairs if _steps(r, final(base))]
        if not reached:
            lines += [f"| {setup} | {lr:g} | {len(mine)} | not reached | | | |"] if mine else []
            continue
        steps = [_steps(r, final(base)) or math.nan for r, base in reached]
        own = [_seconds(r, final(base)) / base["seconds_to_validation"][-1] for r, base in reached]
        product = [
            s * step_seconds(r) / (base["steps"] * step_seconds(base))
            for s, (r, base) in zip(steps, reached, strict=True)
        ]
        milliseconds = 1e3 * statistics.mean(step_seconds(r) for r in mine)
        shares = f"{t_interval(own)} | {t_interval(product)} ({len(reached)} of {len(mine)})"
        lines.append(
            f"| {setup} | {lr:g} | {len(mine)} | {statistics.mean(steps):.0f} | {milliseconds:.1f} | {shares} |"
        )
    heads = _head("setup", "lr", "seeds", "steps to AdamW's loss", "ms a step", "× AdamW's time, of the runs",
                  "by steps × ms")  # fmt: skip
    return [*heads, *lines] if lines else []


def _shorter(done: Records, shorter: Records) -> list[str]:
    """A table of runs whose schedule ends earlier, against the whole run of AdamW with the same seed."""
    adamw = _adamw(done)
    lines = []
    for setup, lr, part in dict.fromkeys((r["setup"], r["lr"], r["part"]) for r in shorter):
        of_this = [r for r in shorter if (r["setup"], r["lr"], r["part"]) == (setup, lr, part)]
        mine = [r for r in of_this if r["seed"] in adamw]
        if not mine:
            continue
        losses = _differences(mine, adamw) or ["a run, or AdamW's with its seed, diverged", ""]
        lines.append(f"| {setup} | {lr:g} | {mine[0]['steps']} | {len(mine)} | {' | '.join(losses)} |")
    heads = _head("setup", "lr", "steps", "seeds", "final loss", "against AdamW with all steps")
    return [*heads, *lines] if lines else []


def _adamw(done: Records) -> dict[int, dict[str, Any]]:
    """The runs of AdamW at its best rate, by seed."""
    return _by_seed(done, "AdamW", best(done, "AdamW")[0])


def _by_seed(done: Records, setup: str, lr: float) -> dict[int, dict[str, Any]]:
    return {r["seed"]: r for r in done if r["setup"] == setup and r["lr"] == lr}


def _differences(mine: Records, theirs: dict[int, dict[str, Any]]) -> list[str] | None:
    """The mean final loss and the mean difference, paired by seed, with intervals. None if a run diverged."""
    ours, others = [final(r) for r in mine], [final(theirs[r["seed"]]) for r in mine]
    if not all(map(math.isfinite, [*ours, *others])):
        return None
    return [str(t_interval(ours)), t_interval([a - b for a, b in zip(ours, others, strict=True)]).signed()]


def _seconds(run: dict[str, Any], loss: float) -> float:
    """The seconds of training until this loss was reached, which it was."""
    reached = steps_to(loss, run["seconds_to_validation"], run["validation"]["loss"])
    assert reached is not None
    return reached


def _steps(run: dict[str, Any], loss: float) -> float | None:
    """The number of steps until this loss was reached."""
    return steps_to(loss, run["validation"]["step"], run["validation"]["loss"])
