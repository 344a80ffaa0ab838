"""The forecast of a plan: which runs a stage will have, how many are left, and how long they take."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from evidence.plan import HOME, STAGES, wanted
from evidence.runs import Record, Results, Run, best_point
from evidence.setups import CONTROL
from evidence.sweeps import first_rest, grid_of

WORSE = 1e3  # what a run that is not made yet is worse by than any that is
MOST_ROUNDS = 100


def forecast(results: Results, stages: Sequence[int] = tuple(STAGES)) -> list[Run]:
    """The runs of some stages, those that depend on results among them."""
    return wanted(completed(results), stages)


def completed(results: Results) -> Results:
    """The results with records that are made up for all runs that are missing.

    A run that is not there yet is taken to end with a loss that is lowest at the rates that were best at 34M, or else
    at the middle of its setup's first rates. So the true plan may have a few runs more, where a best rate is at an
    edge, and other setups in its short lists.
    """
    for _ in range(MOST_ROUNDS):
        there = {run_of(record) for record in results.records}
        missing = [run for run in wanted(results, tuple(STAGES)) if run not in there]
        if not missing:
            return results
        results = Results([*results.records, *(_made_up(run, results) for run in missing)])
    return results


def run_of(record: Record) -> Run:
    """The run that a record is of."""
    return Run(*(record[key] for key in ("task", "setup", "lr", "seed", "rest_lr", "part")))


def _made_up(run: Run, results: Results) -> Record:
    """The record that a run is taken to have, as far as a plan reads it."""
    setup = run.setup.removeprefix(CONTROL)
    grid = grid_of(setup)
    at_home = None if run.task == HOME else best_point(results.points(HOME, setup))
    lr, rest = at_home or (grid[len(grid) // 2], first_rest(setup))
    away = abs(math.log2(run.lr / lr))
    away += abs(math.log2((run.lr if run.rest_lr is None else run.rest_lr) / (lr if rest is None else rest)))
    losses = {"step": [0], "loss": [WORSE + away]}
    return {**vars(run), "diverged": False, "validation": losses}


class Seconds:
    """The seconds of a run, as those that are done took.

    They are of the same task and setup if there are any, or else of the task, or else of another task with the same
    model, such as another text.
    """

    def __init__(self, results: Results) -> None:
        self._of: dict[tuple[str, ...], list[float]] = {}
        for record in results.records:
            if record["steps"] and not record["diverged"]:
                for key in _keys(record["task"], record["setup"]):
                    self._of.setdefault(key, []).append(record["seconds"] / record["steps"])

    def of(self, run: Run, steps: int) -> float | None:
        """The seconds of a run whose task has so many steps. None if nothing of its size is done."""
        known = next((self._of[key] for key in _keys(run.task, run.setup) if key in self._of), None)
        return None if known is None else statistics.median(known) * round(steps * run.part)

    def knows(self, run: Run) -> bool:
        """True if a run of the same task and setup is done."""
        return (run.task, run.setup) in self._of


def _keys(task: str, setup: str) -> list[tuple[str, ...]]:
    """The keys under which times are kept that tell how long a run takes, the best first."""
    size = task.partition("-")[2]
    return [(task, setup), (size, "of any text", setup), (size,)]


def outlook(results: Results, stages: Iterable[int], steps: int) -> str:
    """A line for each stage: how many of its runs are done, how many are left, and how long these take."""
    seconds = Seconds(results)
    done = {run_of(record) for record in results.records}
    whole = completed(results)
    lines = []
    for stage in stages:
        runs = wanted(whole, [stage])
        left = [run for run in runs if run not in done]
        known = [time for run in left if (time := seconds.of(run, steps)) is not None]
        like_others = sum(not seconds.knows(run) for run in left) - (len(left) - len(known))
        said = [f"stage {stage}: {len(runs) - len(left)} of about {len(runs)} runs are done"]
        if known:
            said.append(f"{len(known)} that are left take about {sum(known):,.0f} s")
            said[-1] += f" if {like_others} of them are as fast as other setups" if like_others else ""
        if unknown := len(left) - len(known):
            said.append(f"{unknown} are of a size that was not timed yet")
        lines.append("; ".join(said))
    return "\n".join(lines)
