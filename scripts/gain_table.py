"""What the runs of `gain.py` have shown, as tables."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from gain_plan import best, final, results

from selective.compare.intervals import steps_to, t_interval


def table(folder: Path) -> str:
    """Every setup at its best rate: final loss, steps to AdamW's final loss, time; then all runs."""
    done = results(folder)
    _, wanted = best(done, "AdamW")
    lines = [
        "| setup | best lr | final loss | steps to AdamW's | s a run | other rates |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for setup in dict.fromkeys(r["setup"] for r in done):
        lr, loss = best(done, setup)
        mine = [r for r in done if r["setup"] == setup and r["lr"] == lr]
        first = next(r for r in mine if r["seed"] == 0)
        reached = "–"
        if math.isfinite(wanted):
            steps = _steps(first, wanted)
            reached = "–" if steps is None else f"{steps:.0f} of {first['steps']}"
        others = ", ".join(
            f"{r['lr']:g}: {final(r):.3f}"
            for r in done if r["setup"] == setup and r["seed"] == 0 and r["lr"] != lr
        )  # fmt: skip
        lines.append(f"| {setup} | {lr:g} | {loss:.3f} | {reached} | {first['seconds']:.0f} | {others} |")
    return "\n".join([*lines, *_over_seeds(done)])


def _over_seeds(done: list[dict[str, Any]]) -> list[str]:
    """Setups with several seeds, paired by seed with AdamW: mean and 95 % interval of the loss, of the difference, of
    how many times fewer steps it took to the same seed's AdamW's final loss."""
    rate = best(done, "AdamW")[0]
    adamw = {r["seed"]: r for r in done if r["setup"] == "AdamW" and r["lr"] == rate}
    lines = []
    for setup in dict.fromkeys(r["setup"] for r in done):
        lr = best(done, setup)[0]
        mine = [r for r in done if r["setup"] == setup and r["lr"] == lr and r["seed"] in adamw]
        if len(mine) < 2:
            continue
        ours, theirs = [final(r) for r in mine], [final(adamw[r["seed"]]) for r in mine]
        if not all(map(math.isfinite, [*ours, *theirs])):
            lines.append(f"| {setup} | {lr:g} | {len(mine)} | a run, or AdamW's with its seed, diverged | | |")
            continue
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        steps = [_steps(r, loss) for r, loss in zip(mine, theirs, strict=True)]
        reached = [r["steps"] / s for s, r in zip(steps, mine, strict=True) if s]  # 0: no better than at the start
        fewer = f"{t_interval(reached)} ({len(reached)} of {len(mine)})" if reached else "not reached"
        lines.append(f"| {setup} | {lr:g} | {len(mine)} | {t_interval(ours)} | {t_interval(differences)} | {fewer} |")
    heads = [
        "",
        "| setup | lr | seeds | final loss | against AdamW | times fewer steps |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    return [*heads, *lines] if lines else []


def _steps(run: dict[str, Any], loss: float) -> float | None:
    """Steps that it took to this loss."""
    return steps_to(loss, run["validation"]["step"], run["validation"]["loss"])
