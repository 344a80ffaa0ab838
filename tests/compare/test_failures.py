"""A run that fails costs nothing but itself: it is listed with its reason, and the others go on."""

from __future__ import annotations

import json
import multiprocessing
import os
import struct
from pathlib import Path

import pytest
import torch
from compare_helpers import ignore, records

from selective.cli import main
from selective.compare import Comparison, WorkerFailed, build, summarise, workers
from selective.compare.config import merge
from selective.compare.devices import devices, worker_count
from selective.compare.plots import write_plots
from selective.compare.setup import Given
from selective.compare.summary import as_json
from selective.compare.table import results_table
from selective.compare.train import write_atomically
from selective.compare.words import in_plain_words

FILE = Path(__file__).with_name("example_task.py")
SMALL = {"steps": 4, "lr": [1e-2], "workers": 1, "controls": False}


def test_a_process_that_is_killed_costs_its_run_only(tmp_path) -> None:
    """A real SIGKILL in the second of three runs, of the only process: another takes its place."""
    config = build({**SMALL, "task": f"{FILE}:Deadly", "seeds": [0, 1, 2]})
    comparison = Comparison(config, tmp_path / "out")
    handled = []
    workers.apart(
        comparison.setup, Given(), comparison.runs, tmp_path / "out" / "runs", 1, workers.Stop(), handled.append
    )
    ends = {message["seed"]: message for message in handled if isinstance(message, dict)}
    assert [ends[seed]["complete"] for seed in (0, 1, 2)] == [True, False, True]
    assert ends[1]["failed"] == (
        "its process was killed by SIGKILL, most often for lack of memory: fewer workers need less"
    )
    straight = {record["seed"]: record for record in run_here(config, tmp_path / "here").values()}
    assert all(straight[seed]["parameters_sha256"] == ends[seed]["parameters_sha256"] for seed in (0, 2))


def run_here(config, folder):
    """The records of a comparison that is run in this process, where nothing is killed."""
    comparison = Comparison(config, folder)
    assert comparison.run(ignore)
    return comparison.records


def test_a_worker_that_cannot_begin_ends_the_comparison(tmp_path, monkeypatch) -> None:
    """A thing that no worker could do is not the failure of a run: here the data has changed since."""
    monkeypatch.setattr(workers.signal, "signal", lambda *_: None)  # it would ignore Ctrl-C from here on
    comparison = Comparison(build({**SMALL, "task": f"{FILE}:Line", "seeds": [0, 1]}), tmp_path / "out")
    ours, theirs = multiprocessing.Pipe()
    workers._work(theirs, comparison.config.model_dump_json(), Given(), {"task": {"name": "another"}}, str(tmp_path))
    pool = workers.Pool(comparison.setup, Given(), comparison.runs, tmp_path, workers.Stop(), ignore)
    pool._workers[ours] = workers._Worker(0, None)
    with pytest.raises(WorkerFailed, match="the data of Line has changed since the comparison started"):
        pool._listen(ours)


class RaisesAt:
    """An optimizer that lacks memory in its second step, at one learning rate."""

    def __init__(self, lr: float) -> None:
        self.lr = lr

    def __call__(self, params, lr: float, seed: int) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(params, lr=lr)
        if lr == self.lr and seed:
            optimizer.register_step_pre_hook(self.fail)
        return optimizer

    def fail(self, optimizer, *_) -> None:
        raise torch.OutOfMemoryError("no memory\nis left")

    __name__ = "raises"


def test_an_error_in_a_run_of_this_process_costs_that_run(tmp_path) -> None:
    config = build({**SMALL, "task": f"{FILE}:Line", "seeds": [0, 1, 2], "lr": [1e-2, 2e-2], "optimizers": ["raises"]})
    comparison = Comparison(config, tmp_path / "out", given=Given(makers={"raises": RaisesAt(2e-2)}))
    assert comparison.run(ignore)
    assert [record["key"] for record in comparison.failed] == ["seed1-01-raises-lr0.02", "seed2-01-raises-lr0.02"]
    assert comparison.failed[0]["failed"] == "OutOfMemoryError: no memory is left"
    summary = comparison.summary
    rows = {(row.contender.index, row.lr): row for row in summary.rows}
    assert summary.seeds == (0, 1, 2)
    assert rows[1, 2e-2].failed == 2
    assert rows[1, 2e-2].loss.n == rows[1, 2e-2].difference.n == 1
    assert all(rows[index, lr].loss.n == 3 for index, lr in rows if (index, lr) != (1, 2e-2))
    assert "Failed: seed1-01-raises-lr0.02: OutOfMemoryError: no memory is left" in summary.notes
    assert any(note.startswith("2 runs failed") for note in summary.notes)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["key"] for run in results["runs"] if run["failed"]] == [record["key"] for record in comparison.failed]


CONFIG = build({"policies": ["MGUP"], "lr": [0.1], "seeds": 3, "steps": 100})


def with_failures(config, losses, failed):
    """Records with these final losses; those of `failed`, (contender, seed), came to no end."""
    made = records(config, losses)
    for record in made:
        if (record["contender"], record["seed"]) in failed:
            record.update(complete=False, failed="its process ended with exit code 1")
            record["validation"] = {"step": [], "loss": [], "lr": []}
    return made


def test_differences_rest_on_the_seeds_that_both_have(tmp_path) -> None:
    losses = {(0, 0.1): [2.0, 2.1, 2.2], (1, 0.1): [1.9, 9.9, 2.1], (2, 0.1): [9.9, 2.1, 2.2]}
    made = with_failures(CONFIG, losses, {(1, 1), (2, 0)})
    summary = summarise(CONFIG, made)
    (effect,) = summary.found
    assert effect.against_base.n == 2
    assert effect.against_base.mean == pytest.approx(-0.1)
    assert (effect.against_control.n, effect.against_control.mean) == (1, pytest.approx(-0.1))
    assert summary.rows[0].loss.n == 3  # the baseline's own row has all of its seeds
    assert [path.name for path in write_plots(CONFIG, summary, made, tmp_path)] == ["loss.png"]
    assert results_table(summary, [{"extra_state_bytes": None, "extra_step_bytes": 1}] * 3).row_count == 3


@pytest.mark.parametrize(
    ("failed", "verdict", "words"),
    [
        (1, "all of its runs failed.", "MGUP() failed: not one of its runs came to its end."),
        (0, "AdamW failed; beats its random control", "nothing can be said, because AdamW failed"),
        (2, "its random control failed. So the gain is not shown to come from", "control failed"),
    ],
)  # fmt: skip
def test_a_contender_all_of_whose_runs_failed(failed, verdict, words) -> None:
    losses = {(0, 0.1): [2.0, 2.1, 2.2], (1, 0.1): [1.9, 2.0, 2.1], (2, 0.1): [2.0, 2.1, 2.2]}
    summary = summarise(CONFIG, with_failures(CONFIG, losses, {(failed, seed) for seed in range(3)}))
    assert verdict in summary.verdicts[0][1]
    assert words in in_plain_words(summary)[0]


def test_the_command_says_that_runs_failed(tmp_path, capsys) -> None:
    out = tmp_path / "out"
    arguments = ["compare", "--task", f"{FILE}:Line", "--steps", "4", "--seeds", "2", "--lr", "1e-2", "--out", str(out)]
    assert main([*arguments, "--workers", "1", "--set", "loop.checkpoint_every=2"]) == 0
    capsys.readouterr()
    (out / "runs" / "seed1-00-AdamW-lr0.01.json").unlink()
    write_atomically(out / "runs" / "seed1-00-AdamW-lr0.01.pt", b"not a checkpoint")
    assert main(["compare", "--resume", "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert "1 of 2 runs failed" in printed.err
    assert "Failed: seed1-00-AdamW-lr0.01: UnpicklingError" in " ".join(printed.out.split())


def test_each_worker_has_a_gpu_where_there_are_several(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    on = {name: build(merge(SMALL, {"device": name, "workers": None})) for name in ("cuda", "cuda:1", "cpu")}
    assert devices(on["cuda"]) == ["cuda:0", "cuda:1", "cuda:2"]
    assert worker_count(on["cuda"]) == 3
    assert devices(on["cuda:1"]) == ["cuda:1"]
    assert worker_count(on["cuda:1"]) == 1
    assert devices(on["cpu"]) == ["cpu"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert devices(on["cuda"]) == ["cuda"]


def test_a_rate_that_diverged_at_a_seed_is_not_best_where_another_failed() -> None:
    """At the seeds that both rates finished, the diverging one is lower; at the third it has no loss at all."""
    config = build({"lr": [0.1, 1.0], "policies": ["MGUP"], "controls": False, "seeds": 3, "steps": 100})
    losses = {(i, lr): [2.0 - lr] * 3 for i in (0, 1) for lr in config.lr}
    losses[0, 1.0] = [None, 1.0, 1.0]
    made = with_failures(config, losses, set())
    first = next(r for r in made if (r["contender"], r["lr"], r["seed"]) == (0, 0.1, 0))
    first.update(complete=False, failed="its process ended with exit code 1")
    summary = summarise(config, made)
    assert [row.lr for row in summary.rows if row.best] == [0.1, 1.0]
    json.dumps(as_json(summary), allow_nan=False)
    assert summary.found[0].against_base.n == 2


def test_a_process_that_dies_in_the_middle_of_a_message_costs_its_run(tmp_path) -> None:
    comparison = Comparison(build({**SMALL, "task": f"{FILE}:Line", "seeds": [0]}), tmp_path / "out")
    handled = []
    pool = workers.Pool(comparison.setup, Given(), [], tmp_path, workers.Stop(), handled.append)
    ours, theirs = multiprocessing.Pipe()

    class Ended:
        exitcode = -15

        def join(self) -> None:
            return None

    pool._workers[ours] = workers._Worker(0, Ended(), ready=True, run=comparison.runs[0], done=3)
    os.write(theirs.fileno(), struct.pack("!i", 1000) + b"half of it")
    theirs.close()
    pool._listen(ours)
    (record,) = handled
    assert (record["failed"], record["steps_done"]) == ("its process was killed by SIGTERM", 3)
    assert pool._workers == {}
