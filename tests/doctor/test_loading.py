"""The doctor takes functions, optimizers and names of them; its errors where there is no optimizer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from selective import Cautious, SelectiveUpdate
from selective.cli import main
from selective.doctor import CannotLoad, Report, doctor

TRAIN = """\
import torch
from torch import nn
from selective import SelectiveUpdate

print("loading data")
def model():
    return nn.Linear(4, 3, bias=False)

def fine(model):
    print("making the optimizer")
    return SelectiveUpdate(torch.optim.AdamW(model.parameters()), policy="cautious")

def wrong(model):
    return SelectiveUpdate(torch.optim.SGD(model.parameters(), lr=0.1), policy="cautious")

def raises(model):
    return helper(model)

def helper(model):
    raise KeyError("the config\\nhas no lr")

def refused(model):
    return SelectiveUpdate(torch.optim.AdamW(model.parameters()), policy="cautios")

def no_model():
    return 3

def leaves(model):
    raise SystemExit("usage: train.py DATA")
"""


def linear() -> nn.Linear:
    return nn.Linear(4, 3, bias=False)


def adamw(params: Any, lr: float = 1e-3) -> SelectiveUpdate:
    return SelectiveUpdate(torch.optim.AdamW(params, lr=lr), policy=Cautious())


def pair() -> Any:
    model = linear()
    return model, adamw(model.parameters())


def as_lightning_returns_it() -> Any:
    model = linear()
    optimizer = adamw(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


NET = linear()


@pytest.mark.parametrize(
    ("factory", "model"),
    [
        (lambda: adamw(linear().parameters()), None),
        (pair, None),
        (pair(), None),
        (adamw(linear().parameters()), None),
        (as_lightning_returns_it, None),
        (lambda model: adamw(model.parameters()), NET),
        (lambda model, lr: adamw(model.parameters(), lr), linear),
        (lambda model=None: adamw((model or NET).parameters()), NET),
        (lambda lr: adamw(linear().parameters(), lr), None),
        (lambda net: [adamw(net.parameters())], NET),
        (adamw, NET),
        (lambda params, lr: adamw(params, lr), NET),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_can_be_handed_over(factory: Any, model: Any) -> None:
    report = doctor(factory, model=model)
    assert report.optimizer == "SelectiveUpdate over torch.optim.adamw.AdamW"
    assert (report.tensors, report.elements, report.exit_code) == (1, 12, 0)


def test_the_learning_rate_and_the_device_are_passed_on() -> None:
    seen: list[Any] = []

    def make(model: nn.Module, lr: float) -> Any:
        seen.extend([lr, next(model.parameters()).device.type])
        return adamw(model.parameters(), lr)

    report = doctor(make, model=linear, lr=0.25, device="meta")
    assert seen == [0.25, "meta"]
    assert "1 parameters have no shape or no memory yet" in str(report.steps.failure)


def test_the_wrapper_inside_of_another_package_s_is_found() -> None:
    class Accelerated(torch.optim.SGD):
        def __init__(self, optimizer: Any) -> None:
            super().__init__([nn.Parameter(torch.ones(1))])
            self.optimizer = optimizer

    assert doctor(Accelerated(adamw(NET.parameters()))).wrapped


def raises() -> Any:
    raise ValueError("first line\nsecond line")


@pytest.mark.parametrize(
    ("factory", "model", "says"),
    [
        (raises, None, r"raises raises ValueError: first line \(.*test_loading.py, line \d+, in raises\)"),
        (lambda: 3, None, "returned a int; an optimizer is needed"),
        (linear, None, "returned a Linear; an optimizer is needed"),
        (SimpleNamespace(), None, "the factory returned a SimpleNamespace"),
        (lambda: (adamw(NET.parameters()), torch.optim.SGD(NET.parameters())), None, "returned 2 optimizers"),
        (adamw, None, "adamw takes parameters; say which model with --model"),
        (lambda model: 1, None, "takes the model; say which model"),
        (lambda model, config: 1, NET, "needs 'config', which nobody knows here"),
        (pair, lambda: 3, "is a int; an nn.Module is needed"),
        (pair, raises, "model raises raises ValueError: first line"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_no_optimizer_is_said_in_one_line(factory: Any, model: Any, says: str) -> None:
    with pytest.raises(CannotLoad, match=says) as caught:
        doctor(factory, model=model)
    assert "\n" not in str(caught.value)


# On the command line


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., tuple[int, str, str]]:
    """A function that runs the command in a folder with train.py. It returns the exit code, the output, the errors."""
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "broken.py").write_text("x = 1\nimport no_such_package\n")
    (tmp_path / "divides.py").write_text("x = 1\ny = x / 0\n")
    (tmp_path / "syntax.py").write_text("x = 1\ndef :\n")
    (tmp_path / "exits.py").write_text("import sys\nsys.exit('usage')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # loading a file adds its folder

    def command(*arguments: str) -> tuple[int, str, str]:
        code = main(["doctor", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def test_exit_codes(run: Any) -> None:
    code, out, _ = run("train.py:fine", "--model", "train.py:model")
    assert code == 0
    assert out.startswith("SelectiveUpdate over torch.optim.adamw.AdamW\n")
    assert "Nothing to mend" in out
    code, out, _ = run("train.py:wrong", "--model", "train.py:model")
    assert code == 1
    assert "To mend\n  - Cautious() selects every coordinate of SGD" in out
    assert "1 thing to mend" in out


def test_json_is_the_report_and_nothing_else(run: Any) -> None:
    code, out, err = run("train.py:fine", "--model", "train.py:model", "--json")
    assert code == 0
    data = json.loads(out)  # what train.py prints is not in it
    assert err.splitlines() == ["loading data", "making the optimizer"]
    assert data["schema_version"] == 1
    assert data["exit_code"] == 0
    assert data["groups"][0]["facts"]["policy"] == ["Cautious()"]
    report = Report.model_validate_json(out)
    assert report.model_dump(mode="json") == data
    assert set(data) == set(Report.model_json_schema()["properties"])
    code, out, _ = run("train.py:wrong", "--model", "train.py:model", "--json")
    assert json.loads(out)["exit_code"] == code == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train.py:raises", "--model", "train.py:model"], "KeyError: 'the config"),
        (["train.py:raises", "--model", "train.py:model"], "(train.py, line 20, in helper)"),
        (["train.py:refused", "--model", "train.py:model"], "did you mean 'Cautious'?"),
        (["train.py:refused", "--model", "train.py:model"], "(train.py, line 23, in refused)"),
        (["train.py:leaves", "--model", "train.py:model"], "SystemExit: usage: train.py DATA (train.py, line 29"),
        (["train.py:fine"], "takes the model; say which model with --model module:name"),
        (["train.py:fine", "--model", "train.py:no_model"], "is a int; an nn.Module is needed"),
        (["train.py:fin", "--model", "train.py:model"], "train.py has no 'fin'"),
        (["train:fine"], "train cannot be imported"),
        (["train.py"], "names no object; write module:name"),
        (["nowhere.py:make"], "there is no file nowhere.py"),
        (["broken.py:make"], "(broken.py, line 2)"),
        (["divides.py:make"], "raises ZeroDivisionError when it is imported: division by zero (divides.py, line 2)"),
        (["syntax.py:make"], "syntax.py, line 2"),
        (["exits.py:make"], "exits.py ends the program when it is imported (exits.py, line 2)"),
        (["train.py:fine", "--model", "train.py:model", "--device", "abacus"], "moving the model to abacus raises"),
    ],
)
def test_what_cannot_be_loaded_is_said_with_exit_code_2(run: Any, arguments: list[str], says: str) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    message = err.splitlines()[-1]
    assert message.startswith("selective doctor: ")
    assert says in message
