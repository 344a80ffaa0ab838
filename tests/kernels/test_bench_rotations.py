"""The benchmark of rotations: what it says follows from what it times. Asserts no time."""

from __future__ import annotations

import json
import os
import signal

import pytest

from selective.bench import SHAPES, rotations
from selective.bench.__main__ import main
from selective.bench.rotations import measure_rotations
from selective.bench.rotations_table import rotation_table


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SHAPES, "gpt2", [(20_000, 4), (12, 8), (8,), (6, 10), (1, 5)])


def test_every_line_is_there_and_its_facts_hold():
    result = measure_rotations("gpt2", device="cpu", rounds=2)
    assert (result.matrices, result.rotated) == (2, 12 * 8 + 6 * 10)
    names = [line.name for line in result.lines]
    assert names == [
        "dense", "products float32", "one-sided float32", "refresh cholesky", "refresh qr", "refresh eigh",
        "refresh cholesky rotate", "refresh cholesky keep", "staggered",
    ]  # fmt: skip
    sided, dense, products = (result.line(n) for n in ("one-sided float32", "dense", "products float32"))
    assert sided.facts["ratio"] == pytest.approx(sided.seconds / (dense.seconds + products.seconds))
    squares = 8**2 + 6**2
    assert sided.facts["documented"] == 4 * squares
    counters = 2 * 5 * 8  # five int64 a matrix
    assert sided.facts["bytes"] == 4 * squares + 2 * 4 + counters  # and a float32 for the noise
    refresh = result.line("refresh qr")
    assert refresh.seconds == pytest.approx((refresh.facts["at_once"] - refresh.facts["step"]) / 10)
    assert (refresh.facts["documented"], refresh.facts["bytes"]) == (8 * squares, 8 * squares + counters)
    assert refresh.facts["bases"] > 0
    assert result.line("staggered").facts["worst"] >= 1
    printed = rotation_table(result)
    assert "2 matrices" in printed
    assert "× cholesky's" in printed


def test_from_the_command_line(tmp_path, capsys):
    file = tmp_path / "rotations.json"
    assert main(["--rotations", "--device", "cpu", "--shapes", "gpt2", "--rounds", "1", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert written["torch"]
    assert written["rotations"][0]["lines"][0]["name"] == "dense"
    assert "staggered" in capsys.readouterr().out


def test_what_it_does_not_measure(capsys):
    with pytest.raises(SystemExit):
        main(["--rotations", "--only", "MGUP"])
    assert "leave --only and --dtype out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="must be one of"):
        measure_rotations("nothing", device="cpu")


def test_a_time_limit_leaves_what_has_been_measured(tmp_path, monkeypatch, capsys):
    file, steady = tmp_path / "rotations.json", rotations._Rig.steady

    def interrupted(self, space):
        if space is not None:
            os.kill(os.getpid(), signal.SIGTERM)
        return steady(self, space)

    monkeypatch.setattr(rotations._Rig, "steady", interrupted)
    assert main(["--rotations", "--device", "cpu", "--shapes", "gpt2", "--rounds", "1", "--json", str(file)]) == 130
    (result,) = json.loads(file.read_text())["rotations"]
    assert [line["name"] for line in result["lines"]] == ["dense", "products float32"]
    assert result["interrupted"] is True and "interrupted" in capsys.readouterr().out
