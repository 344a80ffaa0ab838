"""The benchmark: refuses what computes something else, and reports what it has measured. Asserts no time."""

from __future__ import annotations

import json
import math

import pytest
import torch

from selective import Cautious, SelectiveUpdate
from selective.bench import SHAPES, Contender, Mismatch, as_json, run, standard_contenders, table, torch_contenders
from selective.bench.__main__ import main
from selective.bench.measure import check, extra_bytes, parameters
from selective.kernels.cpu import applying


def adamw(params, **more):
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1, **more)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", [(30, 7), (11,), ()])


@pytest.mark.parametrize(
    "name, millions, tensors", [("transformer-30m", 29.4, 50), ("gpt2", 124.4, 148), ("conv", 25.6, 161)]
)
def test_shape_sets_are_the_models_they_name(name, millions, tensors):
    assert sum(math.prod(shape) for shape in SHAPES[name]) / 1e6 == pytest.approx(millions, abs=0.1)
    assert len(SHAPES[name]) == tensors


def test_many_small_is_a_thousand_of_64_to_4096():
    sizes = [math.prod(shape) for shape in SHAPES["many-small"]]
    assert len(sizes) == 1000
    assert (min(sizes), max(sizes)) == (64, 4096)


@pytest.mark.parametrize("contender", standard_contenders(), ids=lambda c: c.name)
def test_every_contender_matches_its_reference(contender):
    check(contender)


def test_another_step_gets_no_time(tiny):
    wrong = Contender("Adam", lambda p: torch.optim.Adam(p, lr=1e-3), make_reference=adamw)
    (measured,) = run("tiny", [wrong], rounds=1)
    assert measured.seconds == []
    assert "elements of a parameter of shape" in (measured.refused or "")
    assert "no time: Adam:" in table([measured])


def test_a_broken_kernel_gets_no_time(monkeypatch):
    real = applying.Applier._write

    def slightly_off(self, start, end, masked):
        real(self, start, end, masked)
        self.flat.param[start:end] *= 1 + 1e-4

    monkeypatch.setattr(applying.Applier, "_write", slightly_off)
    with pytest.raises(Mismatch, match="a time would be that of another step"):
        check(Contender("ours", lambda p: SelectiveUpdate(adamw(p), policy=Cautious())))


def test_own_optimizer_is_timed_beside_torch(tiny):
    mine = Contender("mine", lambda p: SelectiveUpdate(adamw(p), policy=Cautious()))
    measured = run("tiny", [*torch_contenders(), mine], rounds=3, warm_up=1)
    assert [len(m.seconds) for m in measured] == [3, 3, 3, 3]
    assert measured[0].versus_foreach == 1
    assert all(m.versus_foreach and m.versus_fused for m in measured)
    report = as_json(measured, "tiny")
    assert report["torch"] == torch.__version__
    assert report["measurements"][3]["name"] == "mine"


def test_extra_bytes_sees_foreach_temporaries():
    params = parameters([(1000, 100)])
    optimizer = adamw(params, foreach=True)
    optimizer.step()
    assert 400_000 <= extra_bytes(optimizer) <= 3 * 400_000  # it holds a temporary or two of the parameter's size


def test_command_line(tiny, tmp_path, capsys):
    file = tmp_path / "out.json"
    assert main(["--shapes", "tiny", "--only", "top-K × fixed", "--rounds", "2", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "top-K × fixed + statistics" in printed
    names = [m["name"] for m in json.loads(file.read_text())["measurements"]]
    assert names == [
        "torch foreach",
        "torch fused",
        "top-K × fixed",
        "top-K × fixed + statistics",
        "scratch around fused: top-K × fixed",
    ]
    with pytest.raises(ValueError, match="shapes is 'huge', must be one of"):
        run("huge")
