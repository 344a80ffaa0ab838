"""The forecast of scripts/evidence: what a stage will have, what is left, and how long it takes."""

from __future__ import annotations

import re
from typing import Any

import pytest
from evidence.forecast import Seconds, completed, forecast, outlook, run_of
from evidence.plan import STAGES, wanted
from evidence.ranking import best_setups
from evidence.run import COMPILING, expected
from evidence.runs import Results, Run
from evidence.sweeps import SEEDS


def record(run: Run, loss: float = 2.0, seconds: float = 30.0, steps: int = 600) -> dict[str, Any]:
    ends = {"diverged": False, "validation": {"step": [0, steps], "loss": [9.0, loss]}}
    return {**vars(run), **ends, "steps": steps, "seconds": seconds}


def test_a_plan_without_results_is_forecast_to_its_end() -> None:
    runs = forecast(Results([]))
    assert len({run.file for run in runs}) == len(runs)
    assert wanted(completed(Results([])), tuple(STAGES)) == runs
    tasks = {
        "python-34m",
        "english-34m",
        "english-34m-256",
        "python-110m",
        "english-110m",
        "foldoc-minilm",
        "pictures-mae",
    }
    assert {run.task for run in runs} == tasks
    first = [run for run in runs if run.task == "python-34m" and run.setup == "AdamW" and run.part == 1]
    assert {run.seed for run in first} == set(SEEDS)
    large = {run.setup for run in runs if run.task == "python-110m"}
    assert {"AdamW", "Muon"} < large
    assert len(large) == 4, "and the two setups that are best at 34M"


def test_what_is_there_is_part_of_it() -> None:
    """Runs that exist are worth more than those that are made up, so that the best rate is among them."""
    rates = (7.5e-4, 1.5e-3, 3e-3, 6e-3)
    records = [record(Run("python-34m", "AdamW", lr), abs(lr - 7.5e-4)) for lr in rates]
    runs = forecast(Results(records), [1])
    mine = [run for run in runs if run.setup == "AdamW"]
    assert {run.lr for run in mine if run.seed == 0} == {*rates, 3.75e-4}, "the best was at the edge"
    assert {run.lr for run in mine if run.seed == 2} == {7.5e-4}
    assert run_of(records[2]) == Run("python-34m", "AdamW", 3e-3)
    results = Results(records)
    assert best_setups(results, "python-34m", [["AdamW"]], 1) == []
    assert len(results.records) == 4, "the results themselves are left as they are"


def test_seconds_are_of_the_nearest_runs() -> None:
    runs = [
        record(Run("python-34m", "AdamW", 1e-3), seconds=30),
        record(Run("python-34m", "Muon", 1e-2), seconds=60),
        record(Run("python-34m", "AdamW", 1e-3, seed=1), seconds=32),
        record(Run("python-34m", "AdamW", 1e-3, seed=2), seconds=34),
        record(Run("python-34m", "Lion", 1e-3), seconds=500) | {"diverged": True},
    ]
    seconds = Seconds(Results(runs))
    assert seconds.of(Run("python-34m", "AdamW", 9e-3), 600) == pytest.approx(32)
    assert seconds.of(Run("english-34m", "Muon", 9e-3), 600) == pytest.approx(60)
    assert seconds.of(Run("python-34m", "AdamW", 9e-3, part=1.5), 600) == pytest.approx(48)
    assert seconds.of(Run("english-34m", "Lion", 9e-3), 300) == pytest.approx(33 / 2), "of any setup of its size"
    assert seconds.of(Run("python-110m", "AdamW", 9e-3), 600) is None


def test_a_run_is_expected_to_take_as_long_as_its_setup() -> None:
    results = Results([record(Run("python-34m", "AdamW", 1e-3), seconds=30)])
    same, other = Run("python-34m", "AdamW", 2e-3), Run("python-34m", "Muon", 2e-3)
    assert expected(same, results, 600, slowest=0.1) == pytest.approx(30)
    assert expected(other, results, 600, slowest=0.1) == pytest.approx(60)
    assert expected(other, results, 600, slowest=0.0) == pytest.approx(30)
    assert expected(other, Results([]), 600, slowest=0.0) == 0
    assert expected(same, results, 600, slowest=0.1, compiled=False) == pytest.approx(30 + COMPILING)


def test_the_outlook_has_a_line_for_each_stage() -> None:
    runs = forecast(Results([]), [1])
    nothing, some = (
        outlook(results, [1, 4], 600).splitlines() for results in (Results([]), Results([record(runs[0])]))
    )
    assert (
        nothing[0] == f"stage 1: 0 of about {len(runs)} runs are done; {len(runs)} are of a size that was not timed yet"
    )
    assert some[0].startswith("stage 1: 1 of about ")
    assert re.search(r"; (\d+) that are left take about [\d,]+ s if \d+ of them are as fast as other setups$", some[0])
    assert some[1].endswith("are of a size that was not timed yet")
