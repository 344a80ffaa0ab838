"""Results that the files of `make demo` state, computed from the runs in them."""

from __future__ import annotations

from typing import Any

from selective.compare import Summary, build, summarise
from selective.compare.intervals import Interval, steps_to, t_interval


def summary_of(result: dict[str, Any]) -> Summary:
    return summarise(build(result["config"]), result["runs"])


def best_rows(summary: Summary) -> dict[int, Any]:
    """Each contender's row at its best rate, by its index."""
    return {row.contender.index: row for row in summary.rows if row.best}


def less_time(result: dict[str, Any], contender: int) -> Interval:
    """The factor by which AdamW took longer to its own final loss, paired by seed, both at their best rates."""
    summary = summary_of(result)
    rows = best_rows(summary)
    run = {(r["contender"], r["lr"], r["seed"]): r for r in result["runs"]}
    ratios = []
    for seed in summary.seeds:
        base, mine = (run[index, rows[index].lr, seed] for index in (0, contender))
        steps = steps_to(base["validation"]["loss"][-1], mine["validation"]["step"], mine["validation"]["loss"])
        assert steps is not None
        ratios.append(base["seconds"] / (mine["seconds"] * steps / mine["steps_done"]))
    return t_interval(ratios)
