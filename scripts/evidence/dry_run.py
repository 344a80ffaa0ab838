"""The dry run: every row of a plan makes its model and optimizer and takes two steps, at toy size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from evidence.forecast import forecast
from evidence.runs import Results, Run
from evidence.setups import optimizer_of
from evidence.tasks import TASKS
from evidence.toys import TOYS
from evidence.training import Trainer

STEPS = 2
Makers = Mapping[str, Callable[[], Any]]


def rows_of(results: Results, stages: Sequence[int]) -> list[Run]:
    """A run for each task and setup of a plan, with two rates or with one."""
    rows = {(run.task, run.setup, run.rest_lr is None): run for run in forecast(results, stages)}
    return [replace(run, part=1.0) for run in rows.values()]


def dry_run(rows: Iterable[Run], device: str = "cpu", toys: Makers = TOYS) -> list[str]:
    """Do the rows at toy size. Returns a line for each one that fails."""
    failed: list[str] = []
    trainers: dict[str, Trainer] = {}
    for run in rows:
        try:
            if run.task not in trainers:
                trainers[run.task] = Trainer(toys[run.task](), optimizer_of, STEPS, STEPS, device)
            record = trainers[run.task].go(run)
        except Exception as error:  # whatever a row raises is what is looked for
            failed.append(f"{run.task}, {run.setup}: {type(error).__name__}: {error}")
        else:
            if record["validation"]["step"][-1:] != [STEPS]:
                failed.append(f"{run.task}, {run.setup}: it diverged in {STEPS} steps of toy size")
    return failed


def without_data(tasks: Iterable[str], real: Makers = TASKS) -> list[str]:
    """A line for each task whose data is not there, with the command that makes it."""
    lacking = []
    for name in dict.fromkeys(tasks):
        try:
            real[name]()
        except (FileNotFoundError, ValueError) as error:
            lacking.append(f"{name}: {error}")
    return lacking
