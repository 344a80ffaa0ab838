"""Every row of the plan of scripts/evidence makes its model and optimizer and takes two steps, at toy size."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from evidence import run
from evidence.dry_run import dry_run, rows_of, without_data
from evidence.plan import STAGES
from evidence.runs import Results, Run
from evidence.setups import SETUPS
from evidence.tasks import TASKS
from evidence.toys import TOYS, toy_text

ROWS = rows_of(Results([]), tuple(STAGES))
KINDS = ("AdamW", "Cautious on AdamW in Soap")


def test_every_row_of_the_plan_is_tried() -> None:
    assert TOYS.keys() == TASKS.keys() == {row.task for row in ROWS}
    assert {row.setup for row in rows_of(Results([]), [3])} >= {"Muon", "Cautious on Muon", "Muon, whitened"}
    assert len({(row.task, row.setup, row.rest_lr is None) for row in ROWS}) == len(ROWS)


def test_a_sample_of_the_rows() -> None:
    of_kinds = [
        row for row in ROWS if row.setup in KINDS and row.task in ("python-34m", "foldoc-minilm", "pictures-mae")
    ]
    assert dry_run([*ROWS[::13], *of_kinds]) == []


@pytest.mark.slow
def test_all_rows() -> None:
    planned = {row.setup for row in ROWS}
    others = [Run("python-34m", setup, 1e-3) for setup in SETUPS if setup not in planned]
    assert dry_run([*ROWS, *others]) == []


def test_a_row_that_fails_is_named() -> None:
    def broken() -> Any:
        def loss(model: Any, batch: Any) -> torch.Tensor:
            raise RuntimeError("of this task")

        task: Any = toy_text()
        task.loss = loss
        return task

    def infinite() -> Any:
        task: Any = toy_text()
        task.evaluate = lambda model: float("inf")
        return task

    rows = [
        Run("python-34m", "AdamW", 1e-3),
        Run("python-34m", "no such setup", 1e-3),
        Run("english-34m", "AdamW", 1e-3),
    ]
    assert dry_run(rows, toys={"python-34m": broken, "english-34m": infinite}) == [
        "python-34m, AdamW: RuntimeError: of this task",
        "python-34m, no such setup: KeyError: 'no such setup'",
        "english-34m, AdamW: it diverged in 2 steps of toy size",
    ]


def test_data_that_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> Any:
        raise FileNotFoundError("nothing here; `python scripts/evidence/pictures.py` makes it")

    assert without_data(["a", "b", "a"], {"a": missing, "b": toy_text}) == [
        "a: nothing here; `python scripts/evidence/pictures.py` makes it"
    ]
    monkeypatch.setattr(run, "rows_of", lambda results, stages: [Run("python-34m", "AdamW", 1e-3)])
    monkeypatch.setitem(TASKS, "python-34m", missing)
    arguments = ["--out", str(tmp_path / "results"), "--dry-run", "--device", "cpu"]
    assert run.main(arguments) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 rows, 1 failures"
    monkeypatch.setitem(TASKS, "python-34m", toy_text)
    assert run.main(arguments) == 0


def test_workers_share_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is the same command, told to be one process, on its GPU."""
    begun: list[tuple[list[str], dict[str, str]]] = []

    class Process:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            begun.append((command, env))

        def wait(self) -> int:
            return len(begun) - 1

    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    out = ["--out", str(tmp_path)]
    assert run.main([*out, "--device", "cpu", "--workers", "3"]) != 0, "the exit code is that of a process"
    assert [env["CUDA_VISIBLE_DEVICES"] for _, env in begun] == ["4,7"] * 3
    assert all(command[-3:] == ["--one-process", "--workers", "1"] for command, _ in begun)
    begun.clear()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    run.main([*out, "--device", "cuda", "--workers", "2"])
    assert [env["CUDA_VISIBLE_DEVICES"] for _, env in begun] == ["4", "4", "7", "7"]
    with pytest.raises(SystemExit):
        run.main([*out, "--alone", "--workers", "2"])
