"""`compare` in Python and on the command line: contenders of every kind, second learning rates, times."""

from __future__ import annotations

import functools
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_helpers import records
from torch import nn

from selective import MGUP, AdaDiag, Cautious, SelectiveUpdate, Soap, TopK
from selective.cli import _parser, main, settings
from selective.compare import ConfigError, LoopConfig, build, compare, summarise, workers
from selective.compare.contenders import contenders, make, runs
from selective.compare.in_python import _sorted
from selective.compare.optimizers import takes_model
from selective.compare.references import load_object, load_task
from selective.compare.setup import Given, prepare
from selective.compare.table import duration, seconds_text

FILE = Path(__file__).with_name("example_task.py")
LINE = load_task(f"{FILE}:Line")
of_params, of_model, deaf = (load_object(f"{FILE}:{name}", "x") for name in ("of_params", "of_model", "deaf"))


def quietly(folder: Path, contenders: Any, task: Any = LINE, **options: Any):
    quick: dict[str, Any] = {"lrs": [1e-2], "seeds": 1, "steps": 3, "controls": False, "show": False}
    return compare(task, contenders, **{**quick, **options}, out=folder / "out")


def test_contenders_of_every_kind(tmp_path) -> None:
    momentum = functools.partial(torch.optim.SGD, momentum=0.5)
    everyone = [
        Cautious(), Soap(), MGUP, {"kind": "MGUP", "tau": 0.25}, of_params, torch.optim.RMSprop, momentum,
        {"mine": lambda model, lr: SelectiveUpdate(torch.optim.Adam(model.parameters(), lr=lr), policy=Cautious())},
        f"{FILE}:of_model", "nadam",
    ]  # fmt: skip
    ended = quietly(tmp_path, everyone, rest_lrs=[], policies_in_spaces=False, task=Line())
    assert not ended.failed, ended.failed
    assert [c.label for c in ended.contenders] == [
        "AdamW", "Cautious()", "MGUP()", "MGUP(tau=0.25)", "AdamW in Soap()",
        "of_params", "RMSprop", "SGD(momentum=0.5)", "mine", "of_model", "nadam",
    ]  # fmt: skip
    assert [c.role for c in ended.contenders[5:]] == ["optimizer"] * 6
    assert len({record["parameters_sha256"] for record in ended.records.values()}) == 11
    assert ended.records["seed0-08-mine-lr0.01"]["share"]["by_parameter"]["0.weight"]


class Line(type(LINE)):
    """The same task under a name of this module."""

    def batches(self, seed: int):
        return list(super().batches(seed))


@pytest.mark.parametrize(
    ("contenders", "says"),
    [
        ("Cautious", r"is a string; write a list: \['Cautious'\]"),
        (["Cautios"], "'Cautios' is no policy and no preconditioner, and no optimizer has this name:"),
        (["adamm"], r"no optimizer 'adamm' \(did you mean 'Adam'\?\)"),
        ([lambda params, lr: None], "a function needs a name"),
        ([3], "3 is no policy, preconditioner, or function"),
        ([torch.optim.SGD([nn.Parameter(torch.ones(1))])], "SGD is an optimizer over some parameters already"),
        ([TopK()], "is no policy, preconditioner, or function"),
        ([of_params, of_params], "two functions are called of_params"),
        ([{"mine": lambda params, lr: 3}], "optimizer mine returned a int"),
        (Cautious(), r"is no list; write a list: \[Cautious\(\)\]"),
        (of_params, "is no list; write a list"),
        ([{"mine": lambda params, lr: 1 / 0}], "raises ZeroDivisionError for lr=0.01"),
        ([{"mine": lambda: None}], "takes no arguments"),
        ([{"other": lambda model, lr: torch.optim.SGD(nn.Linear(2, 2).parameters())}], "none of its parameters is"),
        ([f"{FILE}:not_callable"], "is a int; a function that makes an optimizer"),
    ],
)
def test_what_is_no_contender_is_said(tmp_path, contenders, says) -> None:
    with pytest.raises(ConfigError, match=says):
        quietly(tmp_path, contenders)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lrs": 1e-2}, r"lrs: 0.01 is no list; write \[0.01\]"),
        ({"lrs": "1e-3,3e-3"}, r"lrs: '1e-3,3e-3' is no list; write \[1e-3,3e-3\]"),
        ({"seeds": 1.5}, "seeds: 1.5 is no list"),
        ({"lrs": []}, "lr: the list is empty; at least one value is needed"),
        ({"base": lambda params, lr: None}, "base: a function needs a name .* write a function with def"),
    ],
)
def test_arguments_that_are_no_lists_are_said(tmp_path, options, says) -> None:
    with pytest.raises(ConfigError, match=says):
        quietly(tmp_path, [], **options)


def test_a_wrong_rate_is_one_line() -> None:
    with pytest.raises(ConfigError) as said:
        build({"lr": [-1.0]})
    assert str(said.value).splitlines()[1:] == ["  lr.0: Input should be greater than 0"]


def test_options_of_the_base_may_be_tuples(tmp_path) -> None:
    ended = quietly(tmp_path, [], base_options={"betas": (0.8, 0.9)})
    assert not ended.failed
    assert ended.config.base_options == {"betas": [0.8, 0.9]}


def test_a_contender_with_the_name_of_the_base_leaves_the_base_as_it_is(tmp_path) -> None:
    def plain(model, lr):  # allocates nothing in a step
        return torch.optim.SGD(model.parameters(), lr=lr)

    alone = quietly(tmp_path / "alone", [])
    beside = quietly(tmp_path / "beside", {"AdamW": plain})
    hashes = [record["parameters_sha256"] for record in beside.records.values()]
    assert [c.label for c in beside.contenders] == ["AdamW", "AdamW (function)"]
    assert hashes[0] == alone.records["seed0-00-AdamW-lr0.01"]["parameters_sha256"] != hashes[1]
    own_base = quietly(tmp_path / "base", {"plain": of_params}, base=plain)
    assert own_base.records["seed0-00-plain-lr0.01"]["parameters_sha256"] == hashes[1]


def test_names_say_what_they_are() -> None:
    sorted_out = _sorted(["MGUP", "soap", "AdaDiag", "a:b"], {})
    assert sorted_out == {"policies": [MGUP()], "preconditioners": [Soap(), AdaDiag()], "optimizers": ["a:b"]}


def test_the_model_or_its_parameters() -> None:
    def annotated(thing: nn.Module, lr: float) -> Any: ...

    def plain(params: Any, lr: float) -> Any: ...

    assert takes_model(lambda model, lr: None)
    assert takes_model(annotated)
    assert not takes_model(plain)
    assert not takes_model(torch.optim.AdamW)
    assert not takes_model(functools.partial(torch.optim.AdamW, betas=(0.9, 0.9)))


def test_a_second_rate_reaches_what_it_is_for(tmp_path) -> None:
    config = build(
        {"task": f"{FILE}:Line", "lr": [0.1], "rest_lr": [0.01, 0.02], "policies": ["Cautious"], "controls": False,
         "preconditioners": ["soap"], "policies_in_spaces": False, "seeds": 1,
         "optimizers": [f"{FILE}:of_params", f"{FILE}:of_model"]}
    )  # fmt: skip
    setup = prepare(config)
    assert [c.pairs for c in contenders(config)] == [((0.1, 0.01), (0.1, 0.02))] * 5
    assert len({run.key for run in runs(config)}) == 10
    for run in runs(config):
        model = setup.task.model(0)
        optimizer = make(setup, run, model)
        of_matrices = {g["lr"] for g in optimizer.param_groups for p in g["params"] if p.ndim == 2}
        of_vectors = {g["lr"] for g in optimizer.param_groups for p in g["params"] if p.ndim < 2}
        assert (of_matrices, of_vectors) == ({0.1}, {run.rest_lr}), run.key
    with pytest.raises(ConfigError, match=r"rest_lr: .*deaf would not get the second learning rate"):
        prepare(config.model_copy(update={"optimizers": (f"{FILE}:deaf",)}))


def test_a_best_pair_is_found_run_and_resumed(tmp_path) -> None:
    ended = quietly(tmp_path, [of_model], lrs=[1e-2, 2e-2], rest_lrs=[1e-2, 3e-2])
    rows = [row for row in ended.summary.rows if row.contender.label == "of_model"]
    assert len(rows) == 4
    (best,) = [row for row in rows if row.best]
    assert best.loss.mean == min(row.loss.mean for row in rows)
    assert any("second learning rate swept" in note for note in ended.summary.notes)
    again = quietly(tmp_path, [of_model], lrs=[1e-2, 2e-2], rest_lrs=[1e-2, 3e-2], resume=True)
    assert again.records == ended.records
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["contenders"][1]["optimizer"] == "of_model"
    assert {row["rest_lr"] for row in results["summary"]["rows"]} == {1e-2, 3e-2}


def test_edges_of_both_sweeps_are_said() -> None:
    config = build({"lr": [0.1, 0.2, 0.3], "rest_lr": [1.0, 2.0], "policies": ["MGUP"], "controls": False, "seeds": 2})
    made = []
    for rest in config.rest_lr:
        some = records(config, {(i, lr): [2.0 + abs(lr - 0.2) + rest] * 2 for i in (0, 1) for lr in config.lr})
        made += [{**record, "rest_lr": rest} for record in some]
    summary = summarise(config, made)
    assert {row.pair for row in summary.rows if row.best} == {(0.2, 1.0)}
    assert summary.found[0].at_edge
    edges = [note for note in summary.notes if note.startswith("Best at")]
    assert edges == ["Best at the lowest second learning rate swept, 1: AdamW, MGUP(). A better one may lie beyond it."]


def test_time_to_the_baselines_loss() -> None:
    """Both fall in a line from 4; the policy twice as fast by steps, at three times the time of a step."""
    config = build({"policies": ["MGUP"], "lr": [0.1], "controls": False, "seeds": 2, "steps": 100})
    made = records(config, {(0, 0.1): [3.0, 3.0], (1, 0.1): [2.0, 2.0]})
    for record in made:
        record["seconds_to_validation"] = [0.0, 10.0 if record["contender"] == 0 else 30.0]
    summary = summarise(config, made)
    policy = summary.rows[1]
    assert (policy.steps, policy.speed.mean) == (50.0, 2.0)
    assert (policy.seconds, policy.time_speed.mean) == (15.0, pytest.approx(2 / 3))
    assert seconds_text(policy, 2) == "15.0 s (0.67 ± 0.00 ×)"
    assert summary.found[0].time_speed == policy.time_speed
    for record in made:
        del record["seconds_to_validation"]  # as in results from before
    old = summarise(config, made).rows[1]
    assert (old.steps, old.seconds, seconds_text(old, 2)) == (50.0, None, "")
    assert [duration(s) for s in (0.123, 12.34, 300, 9000)] == ["0.12 s", "12.3 s", "5 min", "2.5 h"]


def test_the_base_may_be_a_class_or_a_function(tmp_path) -> None:
    named = quietly(tmp_path / "named", [Cautious()], base="SGD")
    by_class = quietly(tmp_path / "class", [Cautious()], base=torch.optim.SGD)
    assert named.records.keys() == by_class.records.keys()
    for key, record in named.records.items():
        assert by_class.records[key]["parameters_sha256"] == record["parameters_sha256"]
    mine = quietly(tmp_path / "function", [Cautious()], base=of_params, loop=LoopConfig(weight_decay=0.0))
    assert [c.label for c in mine.contenders] == ["of_params", "Cautious()"]
    assert not mine.failed


def test_what_cannot_be_sent_to_a_process_is_said(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"mine: cannot be sent to worker processes .*workers=1"):
        quietly(tmp_path, {"mine": lambda params, lr: torch.optim.SGD(params, lr=lr)}, task=f"{FILE}:Line", workers=2)


def test_shown_in_the_terminal_with_pictures(tmp_path, capsys) -> None:
    ended = compare(LINE, [Cautious()], lrs=[1e-2], seeds=2, steps=4, out=tmp_path / "out", show=True)
    printed = capsys.readouterr().out
    assert "Line with 26 parameters on cpu" in printed
    assert "time to" in printed
    assert "Cautious()" in printed.splitlines()[-1]
    assert (tmp_path / "out" / "loss.png").stat().st_size > 10_000
    assert "text" not in json.loads((tmp_path / "out" / "results.json").read_text())
    assert ended.complete


def test_a_task_on_the_command_line(tmp_path, capsys) -> None:
    out = tmp_path / "out"
    named = ["--task", f"{FILE}:Line", "--optimizer", f"{FILE}:of_params", "--lr", "1e-2,2e-2", "3e-2"]
    assert main(["compare", *named, "--steps", "3", "--seeds", "1", "--workers", "1", "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["task"]["name"] == "Line"
    assert [c["label"] for c in results["contenders"]] == ["AdamW", "of_params"]
    assert results["config"]["lr"] == [1e-2, 2e-2, 3e-2]
    assert main(["compare", "--resume", "--out", str(out)]) == 0
    assert "of_params" in capsys.readouterr().out


@pytest.mark.parametrize("written", [["1e-3,3e-3"], ["1e-3", "3e-3"], ["1e-3,", "3e-3"], ["1e-3, 3e-3"]])
def test_rates_with_commas_or_spaces(written) -> None:
    options = _parser().parse_args(["compare", "--lr", *written, "--rest-lr", *written])
    assert settings(options) == {"lr": [1e-3, 3e-3], "rest_lr": [1e-3, 3e-3]}


def test_a_rate_that_is_none_is_a_usage_error(capsys) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args(["compare", "--lr", "1e-3;3e-3"])
    assert "learning rates are needed, with spaces or commas" in capsys.readouterr().err


def test_given_objects_are_not_loaded_by_name() -> None:
    config = build({"task": "nowhere:Task", "optimizers": ["mine"]})
    setup = prepare(config, Given(LINE, {"mine": of_params}))
    assert setup.task is LINE
    assert setup.makers == {"mine": of_params}
    with pytest.raises(ConfigError, match="'mine' names no object"):
        prepare(config, Given(LINE))


def test_ctrl_c_is_raised_after_saving_and_resume_goes_on(tmp_path, monkeypatch) -> None:
    left = iter([False] * 3)
    monkeypatch.setattr(workers.Stop, "__call__", lambda _: next(left, True))
    with pytest.raises(KeyboardInterrupt, match="resume=True goes on"):
        quietly(tmp_path, [of_params], steps=4)
    monkeypatch.undo()
    again = quietly(tmp_path, [of_params], steps=4, resume=True)
    straight = quietly(tmp_path / "straight", [of_params], steps=4)
    assert again.complete
    for key, record in straight.records.items():
        assert again.records[key]["parameters_sha256"] == record["parameters_sha256"]
    with pytest.raises(ConfigError, match="resume: say which comparison to go on with"):
        compare(LINE, resume=True)


def test_what_is_handed_over_survives_the_way_to_a_process() -> None:
    handed = Given(LINE, {"mine": functools.partial(torch.optim.SGD, momentum=0.5), "of_params": of_params})
    arrived = pickle.loads(pickle.dumps(handed))
    assert type(arrived.task) is type(LINE)
    assert arrived.makers["mine"].keywords == {"momentum": 0.5}
    assert arrived.makers["of_params"] is of_params


SCRIPT = """
import torch
from selective.compare import compare


class Task:
    def model(self, seed):
        return torch.nn.Linear(2, 1)

    def batches(self, seed):
        return [torch.ones(3, 2), torch.eye(2)]

    def loss(self, model, batch):
        return (model(batch) - 1).square().mean()

    def evaluate(self, model):
        return self.loss(model, torch.eye(2)).item()


def mine(params, lr):
    return torch.optim.SGD(params, lr=lr)


if __name__ == "__main__":
    ended = {
        workers: compare(Task, [mine], lrs=[0.1], seeds=1, steps=3, workers=workers, out=f"out{workers}", show=False)
        for workers in (1, 2)
    }
    prints = [{key: r["parameters_sha256"] for key, r in c.records.items()} for c in ended.values()]
    assert prints[0] == prints[1], prints
    assert all(c.complete for c in ended.values())
    print("ok")
"""


@pytest.mark.slow
def test_a_script_with_workers(tmp_path) -> None:
    """Class and function of the script itself reach the processes, which give the same numbers as one process."""
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stderr


def test_a_bare_name_is_a_class_on_the_command_line_as_well() -> None:
    given = settings(_parser().parse_args(["compare", "--optimizer", "nadam", "--optimizer", "torch.optim:SGD"]))
    setup = prepare(build(given))
    assert setup.makers == {"nadam": torch.optim.NAdam, "torch.optim:SGD": torch.optim.SGD}
    with pytest.raises(
        ConfigError, match=r"'nadamm' names no object.* unknown: no optimizer 'nadamm' \(did you mean 'NAdam'\?\)"
    ):
        prepare(build({"optimizers": ["nadamm"]}))
