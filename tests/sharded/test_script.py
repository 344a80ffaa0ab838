"""scripts/sharded.py over gloo: what would run over NCCL where there are GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sharded
from sharded_checks import resumed
from sharded_checks.processes import Processes
from sharded_checks.results import Result

RunCases = Callable[..., None]  # conftest.py
ROOT = Path(__file__).resolve().parents[2]
CASES = (
    "selections_over_tensor_parallelism", "local_selections_are_noticed", "rotations_over_tensor_parallelism",
    "another_start_of_a_rotation_is_noticed", "replicas_over_tensor_parallelism",
    "replicas_that_draw_for_themselves_are_noticed", "what_is_not_run_says_why",
)  # fmt: skip
SLOW = ("selections_everywhere", "rotations_everywhere", "replicas_everywhere", "muon_everywhere")


def test_checks_pass_and_notice(run_cases: RunCases, tmp_path: Path) -> None:
    run_cases([f"sharded_cases_script:{name}" for name in CASES], 4, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", SLOW)
def test_every_layout(case: str, run_cases: RunCases, tmp_path: Path) -> None:
    run_cases([f"sharded_cases_script:{case}"], 4, tmp_path, 880)


def test_the_script_starts_processes_and_writes_what_they_found(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [sys.executable, str(ROOT / "scripts" / "sharded.py"), "--cpu", "--processes", "2", "--layout", "fsdp",
               "--check", "muon", "waits", "--out", str(out)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "2 ok, 0 failed, 1 not run"
    found = json.loads(out.read_text())
    assert found["about"]["backend"] == "gloo" and found["about"]["command"].endswith(str(out))
    assert [(r["check"], r["passed"], r["processes"]) for r in found["results"]] == [
        ("muon", True, 2), ("muon", True, 2), ("waits", None, 2),
    ]  # fmt: skip


def test_a_failed_check_is_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failed = Result("selections", "fsdp", "SGD, MGUP", False, "3 selected otherwise", {}, 2)
    monkeypatch.setattr(sharded, "started", lambda *_: [failed])
    assert sharded.main(["--cpu", "--check", "selections", "--layout", "fsdp"]) == 1
    assert "0 ok, 1 failed, 0 not run" in capsys.readouterr().out
    assert str(failed).startswith("FAILED  selections  fsdp          2 processes  SGD, MGUP: ")


def test_checks_after_an_error_are_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Processes that end with an error, the first time before any result, are started again for one check each."""
    asked = []

    class Ending:
        def __init__(self, command: list[str], size: int) -> None:
            asked.append(command[len(command) - command[::-1].index("--check") :])

        def wait(self, seconds: float) -> int:
            return sharded.CRASHED

    monkeypatch.setattr(sharded, "Processes", Ending)
    arguments = ["--cpu", "--check", "muon", "waits", "--layout", "ddp", "--processes", "2"]
    assert sharded.main(arguments) == 1
    assert asked == [["muon", "waits"], ["muon"], ["waits"]]
    assert capsys.readouterr().out.count("the processes: ended with 2") == 3


def test_a_process_that_ends_badly_ends_the_others() -> None:
    code = "import os, sys, time; sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(100)"
    processes = Processes([sys.executable, "-c", code], 2)
    assert processes.wait(50) == 3
    assert all(process.returncode is not None for process in processes.processes)


@pytest.mark.parametrize(
    ("after", "passed"),
    [({7: 2.0, 12: 1.5}, True), ({7: 2.1, 12: 1.5}, False), ({1: 3.0, 12: 1.5}, False), ({7: 2.0, 11: 1.6}, False)],
    ids=["goes on", "other losses", "begins anew", "ends early"],
)
def test_what_a_resumed_run_has_to_do(after: dict[int, float], passed: bool) -> None:
    undisturbed = {1: 3.0, 7: 2.0, 8: 1.9, 11: 1.6, 12: 1.5}
    assert resumed._judged("fsdp", "", {1: 3.0, 8: 1.9}, after, undisturbed, 5e-6).passed is passed


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("asynchronous", [False, True], ids=["saves", "asynchronous saves"])
def test_killed_and_resumed(asynchronous: bool) -> None:
    """Over the training's own gloo group, asynchronous saves of four processes never ended, those of two did."""
    processes = 4 if asynchronous else 2
    found = list(resumed.resumed(processes, hsdp=False, asynchronous=asynchronous, cpu=True))
    assert len(found) == (3 if asynchronous else 2) and all(result.passed for result in found), found
