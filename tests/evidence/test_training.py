"""scripts/evidence/run.py on a model of a few thousand parameters: sittings, records, and several processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from evidence import plan, run, runs, sweeps, tasks
from evidence.runs import Results, Run
from evidence.setups import optimizer_of
from evidence.tokens import read, write
from evidence.training import Trainer

from selective import SelectiveUpdate
from selective.compare import compare
from selective.compare.config import ModelConfig

SHAPE = ModelConfig(layers=1, width=8, heads=2, context=8)
TINY = ["--device", "cpu", "--stage", "1", "--steps", "2", "--micro-batch", "4", "--evaluate-every", "1"]


@pytest.fixture
def task(tmp_path: Path) -> tasks.TextTask:
    tokens = torch.randint(0, 30, (600,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    write("toy", tokens[:500], tokens[500:], {"vocabulary": 32}, tmp_path / "tokens")
    return tasks.llama("toy", SHAPE, folder=tmp_path / "tokens", batch_size=4, micro_batch=2, evaluate_windows=6)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, task: tasks.TextTask) -> None:
    """A stage with one policy, and the toy text in the place of the large one."""
    monkeypatch.setitem(tasks.TASKS, "python-34m", lambda: task)
    monkeypatch.setitem(plan.STAGES, 1, lambda results: plan.masks(results, "python-34m", "AdamW", ["Cautious"]))
    monkeypatch.setitem(sweeps.GRIDS, "AdamW", (1e-3, 2e-3))
    monkeypatch.setattr(runs, "MOST_RATES", 2)  # a toy is best at the highest rate, and a sweep would go on


def contents(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.glob("*/*.json")}


@pytest.mark.usefixtures("small")
def test_a_stage_in_sittings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results"
    arguments = ["--out", str(out), *TINY]
    assert run.main([*arguments, "--seconds", "0.001"]) == 0
    assert len(contents(out)) <= 1
    assert run.main(arguments) == 0
    first = contents(out)
    records = [json.loads(text) for text in first.values()]
    assert {r["setup"] for r in records} == {"AdamW", "Cautious on AdamW", "random like Cautious on AdamW"}
    assert {r["steps"] for r in records} == {2, 3}
    for r in records:
        count = len(r["validation"]["loss"])
        assert r["validation"]["step"] == [0, 1, 2, 3][:count]
        assert r["seconds_to_validation"] == sorted(r["seconds_to_validation"])
        assert r["seconds_to_validation"][-1] <= r["seconds"]
        assert count == r["steps"] + 1
    assert len({r["validation"]["loss"][0] for r in records if r["seed"] == 0}) == 1, "everyone from the same start"
    assert len({r["parameters_sha256"] for r in records}) == len(records), "and nobody ends where another did"
    assert run.main(arguments) == 0
    assert contents(out) == first
    capsys.readouterr()
    assert run.main([*arguments, "--list"]) == 0
    assert capsys.readouterr().out.strip().startswith("0 runs are left")
    assert run.main([*arguments, "--table"]) == 0
    table = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert [line.split(" | ")[2] for line in table[2:6]] == ["3"] * 4
    assert "not run" in table[6]
    lost = sorted(first)[3]
    next(out.glob(f"*/{lost}")).unlink()
    assert run.main(arguments) == 0
    again, before = json.loads(contents(out)[lost]), json.loads(first[lost])
    assert again["parameters_sha256"] == before["parameters_sha256"], "a run that is made again is the same"


def test_micro_batches_are_one_batch(task: tasks.TextTask) -> None:
    """The gradient of a batch in parts is that of the whole, up to the rounding of sums in float32."""
    losses = []
    for size in (4, 3):
        task.micro_batch = size
        trainer = Trainer(task, optimizer_of, 1, 1, "cpu")
        losses.append(trainer.go(Run("toy", "AdamW", 1e-2))["validation"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert [len(part) for part, _ in trainer._parts(task.batch(0, 0))] == [3, 1]


def test_a_run_that_diverges_ends_early(task: tasks.TextTask) -> None:
    record = Trainer(task, optimizer_of, 50, 1, "cpu").go(Run("toy", "AdamW", 1e30))
    assert record["diverged"]
    assert len(record["validation"]["loss"]) < 51
    assert Results([record]).losses("toy", "AdamW") == {1e30: float("inf")}


def test_policies_are_for_the_inner_matrices(task: tasks.TextTask) -> None:
    optimizer = optimizer_of(Run("toy", "Cautious on AdamW", 1e-3, rest_lr=2e-3), task.model(0), 1)
    assert isinstance(optimizer, SelectiveUpdate)
    told = str(optimizer.explain())
    assert "(matrices): 7 tensors" in told
    assert "(embeddings, head, vectors): 5 tensors" in told
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("matrices", 1e-3, 0.1), ("embeddings", 2e-3, 0.1), ("head", 2e-3, 0.1), ("vectors", 2e-3, 0.0)
    ]  # fmt: skip
    bare = optimizer_of(Run("toy", "AdamW", 1e-3, rest_lr=2e-3), task.model(0), 1)
    assert [(g["lr"], g["weight_decay"]) for g in bare.param_groups] == [
        (g["lr"], g["weight_decay"]) for g in optimizer.param_groups
    ]


@pytest.mark.slow
def test_the_task_in_a_comparison(task: tasks.TextTask, tmp_path: Path) -> None:
    found = compare(task, ["cautious"], lrs=[1e-2], seeds=2, steps=2, out=tmp_path / "comparison", show=False)
    assert not found.failed
    assert len(found.summary.rows) == 3
    assert found.config.task is not None


def test_tokens_that_are_not_those_of_their_facts_are_refused(task: tasks.TextTask, tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    assert torch.equal(read("toy", folder).train, task.train)
    write("other", task.train.flip(0), task.held_out, {"vocabulary": 32}, folder)
    (folder / "other.tokens.xz").replace(folder / "toy.tokens.xz")
    with pytest.raises(ValueError, match="not the file that toy"):
        read("toy", folder)
    with pytest.raises(FileNotFoundError, match=r"data\.py novel`"):
        read("novel", folder)
    with pytest.raises(FileNotFoundError, match=r"data\.py python --vocabulary 16384 --name python-16k`"):
        read("python-16k", folder)
