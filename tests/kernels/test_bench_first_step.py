"""The benchmark of what comes before training: what it says follows from what it times. Asserts no time."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest

from selective.bench import __main__ as command
from selective.bench import first_step
from selective.bench.first_step import (
    CASES,
    FirstStep,
    FirstSteps,
    first_step_table,
    first_steps_as_json,
    measure_first_steps,
)
from selective.bench.first_step_child import main as child
from selective.bench.first_step_child import shapes_of


@pytest.mark.slow
def test_every_case_is_there_and_its_facts_hold() -> None:
    told: list[str] = []
    cases = [("AdamW", "MGUP"), ("AdamW", "Dense")]
    found = measure_first_steps(
        rounds=1, threads=1, clock="process_time", models=["small"], cases=cases, tell=told.append
    )
    assert told == ["round 1 of 1"]
    assert [(one.base, one.policy, one.way, one.source) for one in found.lines] == [
        ("AdamW", "MGUP", "fused", "table"), ("AdamW", "Dense", "dense", "table"),
    ]  # fmt: skip
    assert found.lines[0].base_step == found.lines[1].base_step  # timed once a round
    assert not any(one.triton for one in found.lines)
    assert {name: len(seconds) for name, seconds in found.imports.items()} == {"import torch": 2, "import selective": 2}
    assert all(seconds > 0 for one in found.lines for seconds in one.construct + one.step + one.base_step)


def test_what_the_cases_are_for() -> None:
    """The model that is called like a GPT has about as many tensors; the unknown bases need both generic captures."""
    assert len(shapes_of("gpt")) == 148
    ways = {name: (said["way"], said["source"]) for name in dict(CASES) for said in [child(name, "small", "MGUP")]}
    assert ways == {
        "AdamW": ("fused", "table"), "NAdam": ("scratch", "table"), "Adafactor": ("delta", "table"),
        "own": ("scratch", "measured"), "own-norm": ("delta", "measured"),
    }  # fmt: skip


def made_up(construct: float, triton: bool = False) -> FirstSteps:
    line = FirstStep("AdamW", "small", "MGUP", 4, "fused", "table", [construct] * 3, [0.05, 0.01, 0.3], [0.01] * 3)
    line.triton = triton
    imports = {"import torch": [1.0] * 3, "import selective": [0.1, 0.4, construct + 0.2]}
    return FirstSteps(3, imports=imports, lines=[line])


def test_the_table_says_what_is_missed() -> None:
    good, bad = first_step_table(made_up(0.05)), first_step_table(made_up(0.2, triton=True))
    assert "MISSED" not in good
    assert "triton" not in good
    assert "import selective 250 ms more" in good
    assert good.splitlines()[2].endswith("90.0")  # the median of 50 + 50 - 10, ...
    assert bad.count("MISSED") == 2
    assert "imports triton" in bad
    written = first_steps_as_json(made_up(0.05))
    assert written["first_steps"][0]["extra_seconds"] == pytest.approx(0.09)
    assert written["imports"]["import selective"]["median_seconds"] == 0.25


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)first step of AdamW, small, MGUPP: .*did you mean 'MGUP'"):
        first_step._in_a_fresh_process("AdamW", "small", "MGUPP", "1", "process_time")


def test_from_the_command_line(tmp_path: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(command, "measure_first_steps", lambda **options: asked.append(options) or made_up(0.05))
    file = tmp_path / "first.json"
    assert command.main(["--first-step", "--rounds", "3", "--json", str(file)]) == 0
    assert (asked[0]["rounds"], asked[0]["threads"], asked[0]["clock"]) == (3, None, "perf_counter")
    assert command.main(["--first-step", "--cpu-time"]) == 0
    assert asked[1]["clock"] == "process_time"
    written = json.loads(file.read_text())
    assert (written["device"], written["first_steps"][0]["policy"]) == ("cpu", "MGUP")
    assert "import selective 250 ms more" in capsys.readouterr().out
    for options in (["--only", "MGUP"], ["--shapes", "gpt2"], ["--rotations"], ["--dtype", "float16"]):
        with pytest.raises(SystemExit):
            command.main(["--first-step", *options])
        assert "measures models and policies of its own" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--cpu-time"])
    assert "goes with --first-step alone" in capsys.readouterr().err


@pytest.mark.parametrize(("at", "left"), [(2, None), (5, 1)])
def test_a_time_limit_leaves_full_rounds(
    at: int, left: int | None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first there is nothing yet to keep. One process to warm up, and two a round."""
    started: list[Any] = []

    def fresh(*arguments: Any) -> dict[str, Any]:
        started.append(arguments)
        if len(started) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"import torch": 1.0, "import selective": 0.2, "tensors": 3, "way": "fused", "source": "known",
                "construct": 0.1, "step": 0.2, "triton": False}  # fmt: skip

    monkeypatch.setattr(first_step, "_in_a_fresh_process", fresh)
    really = first_step.measure_first_steps
    monkeypatch.setattr(
        command, "measure_first_steps", lambda **options: really(models=["small"], cases=[("AdamW", "MGUP")], **options)
    )
    file = tmp_path / "first.json"
    assert command.main(["--first-step", "--rounds", "3", "--json", str(file)]) == 130
    if left is None:
        assert not file.exists()
        return
    written = json.loads(file.read_text())
    assert written["interrupted"] and len(written["first_steps"][0]["step"]) == left
