"""Interrupted and resumed is the same as undisturbed, bit for bit: within a run, over runs, and through Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from compare_helpers import TINY, ignore, never, policy_file, text_file, tiny, trainer

from selective.compare import Comparison, ConfigError, build, workers
from selective.compare.config import merge
from selective.compare.train import fingerprint, write_atomically

POLICIES = ["MGUP", "Cautious", "AlphaConsistency", "Magma", "RandomMask"]


def stop_after(steps: int):
    """A `stop` that is asked before each step, and lets so many through."""
    left = iter([False] * steps)
    return lambda: next(left, True)


@pytest.mark.parametrize("index", range(9))
def test_a_run_goes_on_bit_for_bit(tmp_path, index):
    config = tiny(tmp_path, policies=POLICIES, controls=True, steps=7)
    straight = trainer(config, index)
    straight.go(never, ignore)
    path = tmp_path / "run.pt"
    first = trainer(config, index)
    assert not first.go(stop_after(3), ignore, path)["complete"]
    second = trainer(config, index)
    second.load(path)
    assert second.done == 3
    record = second.go(never, ignore, path)
    assert fingerprint(second.model) == fingerprint(straight.model)
    same = ("key", "steps_done", "complete", "train", "validation", "share", "parameters_sha256")
    assert {name: record[name] for name in same} == {name: straight.record[name] for name in same}
    assert len(record["optimizer_ms"]) == 7


def test_a_run_stopped_before_its_first_step_goes_on(tmp_path):
    config = tiny(tmp_path)
    path = tmp_path / "run.pt"
    trainer(config).go(stop_after(0), ignore, path)
    second = trainer(config)
    second.load(path)
    assert second.go(never, ignore)["validation"]["step"] == [0, 2, 4, 6]


def test_checkpoints_are_written_on_the_way(tmp_path):
    """A killed process leaves its last checkpoint."""
    config = tiny(tmp_path, loop={"checkpoint_every": 2})
    path = tmp_path / "run.pt"
    run = trainer(config)

    def killed(done: int, loss: float) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.go(never, killed, path)
    second = trainer(config)
    second.load(path)
    assert second.done == 4
    straight = trainer(config)
    straight.go(never, ignore)
    second.go(never, ignore)
    assert fingerprint(second.model) == fingerprint(straight.model)


def prints(comparison: Comparison) -> dict[str, str]:
    return {key: record["parameters_sha256"] for key, record in comparison.records.items()}


def test_a_comparison_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    config = tiny(tmp_path, policies=["RandomMask"], seeds=[0, 1])
    straight = Comparison(config, tmp_path / "straight")
    assert straight.run(ignore)
    begun = Comparison(config, tmp_path / "stopped")
    monkeypatch.setattr(workers.Stop, "__call__", staticmethod(stop_after(2 + 6 + 2)))  # 2 runs: in the second
    assert not begun.run(ignore)
    monkeypatch.undo()
    results = json.loads((tmp_path / "stopped" / "results.json").read_text())
    assert not results["complete"]
    assert [run["complete"] for run in results["runs"]] == [True, False]
    again = Comparison(config, tmp_path / "stopped", resume=True)
    assert len(again.todo()) == 3
    assert again.run(ignore)
    assert prints(again) == prints(straight)
    assert not list((tmp_path / "stopped" / "runs").glob("*.pt"))
    nothing_left = Comparison(config, tmp_path / "stopped", resume=True)
    assert nothing_left.complete
    assert nothing_left.run(ignore)


def test_resuming_something_else_is_refused(tmp_path):
    config = tiny(tmp_path)
    Comparison(config, tmp_path / "out").run(ignore)
    with pytest.raises(ConfigError, match=r"steps: 6 before, 8 now"):
        Comparison(tiny(tmp_path, steps=8), tmp_path / "out", resume=True)
    with pytest.raises(ConfigError, match="already holds a comparison; --resume"):
        Comparison(config, tmp_path / "out")
    with pytest.raises(ConfigError, match="holds no comparison"):
        Comparison(config, tmp_path / "elsewhere", resume=True)
    assert Comparison(tiny(tmp_path, workers=2), tmp_path / "out", resume=True).complete  # changes no number
    longer = tiny(tmp_path, steps=8)
    assert Comparison(longer, tmp_path / "out", overwrite=True).todo()
    text_file(tmp_path, size=5000)  # the same name, other bytes
    with pytest.raises(ConfigError, match=r"text\.sha256"):
        Comparison(longer, tmp_path / "out", resume=True)


def test_processes_and_one_process_agree(tmp_path, monkeypatch):
    """One of the policies is the user's own, whose class the processes have to find."""
    policy_file(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    changes = {"imports": ["my_policies"], "policies": [{"kind": "HalfOfIt", "rest": 0.2}, "RandomMask"]}
    config = tiny(tmp_path, **changes)
    threads = torch.get_num_threads()
    alone = Comparison(config, tmp_path / "alone")
    assert alone.run(ignore)
    assert torch.get_num_threads() == threads
    seen = []
    apart = Comparison(tiny(tmp_path, **changes, workers=2), tmp_path / "apart")
    assert apart.run(seen.append)
    assert prints(apart) == prints(alone)
    assert {message.key for message in seen if isinstance(message, workers.Progress)} == set(apart.records)
    assert {message.slot for message in seen if isinstance(message, workers.Progress)} <= {0, 1}


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_whose_checkpoint_is_broken_fails_and_the_others_go_on(tmp_path, count):
    config = tiny(tmp_path, policies=["MGUP"], workers=count, seeds=[0, 1])
    comparison = Comparison(config, tmp_path / "out")
    key = comparison.runs[1].key
    path = tmp_path / "out" / "runs" / f"{key}.pt"
    write_atomically(path, b"not a checkpoint")
    assert comparison.run(ignore)  # to the end
    assert [record["key"] for record in comparison.failed] == [key]
    assert "UnpicklingError" in comparison.failed[0]["failed"]
    assert "Traceback" in comparison.failed[0]["traceback"]
    assert not comparison.complete
    assert any(f"Failed: {key}: UnpicklingError" in note for note in comparison.summary.notes)
    path.unlink()
    again = Comparison(config, tmp_path / "out", resume=True)
    assert [run.key for run in again.todo()] == [key]
    assert again.run(ignore)
    assert again.complete


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ctrl_c_keeps_what_there_is_and_resume_goes_on(tmp_path, count):
    """A real SIGINT to the real command, in the middle of a run."""
    settings = merge(TINY, {"data": {"file": str(text_file(tmp_path))}, "policies": ["RandomMask"], "workers": count})
    settings = merge(settings, {"seeds": [0, 1], "steps": 50, "loop": {"evaluate_every": 25, "checkpoint_every": 10}})
    (tmp_path / "mine.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "selective.cli", "compare", "--config", str(tmp_path / "mine.json")]
    interrupted = [*command, "--out", str(tmp_path / "stopped")]
    process = subprocess.Popen(
        interrupted, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ)
    )
    runs = tmp_path / "stopped" / "runs"
    deadline = time.monotonic() + 120  # for a hang only
    while not list(runs.glob("*.pt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)  # a checkpoint: it is in the middle of its first run
    process.send_signal(signal.SIGINT)
    if count == 2:
        process.send_signal(signal.SIGINT)  # delivered twice, as `timeout` does: still one Ctrl-C
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "--resume" in output
    results = json.loads((tmp_path / "stopped" / "results.json").read_text())
    assert not results["complete"]
    config = build({**settings, "workers": 1})  # how many at a time makes no difference to the numbers
    assert Comparison(config, tmp_path / "stopped", resume=True).run(ignore)
    assert Comparison(config, tmp_path / "straight").run(ignore)
    assert _final(tmp_path / "stopped") == _final(tmp_path / "straight")


def test_a_second_ctrl_c_means_now(monkeypatch):
    clock = iter([10.0, 10.5, 12.0])
    monkeypatch.setattr(workers.time, "monotonic", lambda: next(clock))
    before = signal.getsignal(signal.SIGINT)  # ignored, where the suite runs as a shell's background job
    stop = workers.Stop()
    with stop.listening():
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # half a second later: the same one
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def _final(folder: Path) -> dict[str, object]:
    runs = json.loads((folder / "results.json").read_text())["runs"]
    assert all(run["complete"] for run in runs)
    return {run["key"]: (run["parameters_sha256"], run["train"], run["validation"], run["share"]) for run in runs}


def test_a_comparison_of_before_a_setting_was_there_goes_on(tmp_path):
    """Its config.json lacks `rates`, which then had its default; a value that is not the default is another matter."""
    config = tiny(tmp_path)
    Comparison(config, tmp_path / "out").run(ignore)
    path = tmp_path / "out" / "config.json"
    saved = json.loads(path.read_text())
    del saved["config"]["rates"], saved["config"]["policies_in_spaces"]
    path.write_text(json.dumps(saved))
    assert Comparison(config, tmp_path / "out", resume=True).complete
    with pytest.raises(ConfigError, match=r"rates\.policy: null before, \[0\.1\] now"):
        Comparison(tiny(tmp_path, rates={"policy": [0.1]}), tmp_path / "out", resume=True)
