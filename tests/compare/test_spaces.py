"""Comparisons with preconditioners: the base and every policy once more in each space, on the same terms."""

from __future__ import annotations

import json

import pytest
from compare_helpers import ignore, never, records, text_file, tiny, trainer

from selective import AdaDiag, Eigenbasis, SelectiveUpdate, Soap
from selective.cli import main
from selective.compare import ConfigError, build, summarise
from selective.compare.config import dump
from selective.compare.contenders import contenders
from selective.compare.table import steps_text
from selective.compare.train import fingerprint

SPACES = ["soap", {"kind": "AdaDiag", "sides": "two", "refresh_every": 2}]


def stop_after(steps: int):
    left = iter([False] * steps)
    return lambda: next(left, True)


def test_names_that_people_say():
    config = build({"preconditioners": ["adadiag", "AdaDiag++", "soap", "Eigenbasis", {"kind": "Soap", "beta": 0.9}]})
    assert config.preconditioners == (AdaDiag(), AdaDiag(sides="two"), Soap(), Eigenbasis(), Soap(beta=0.9))
    assert build(json.loads(json.dumps(dump(config)))) == config


@pytest.mark.parametrize(
    ("spaces", "says"),
    [
        (["shampoo"], "kind 'shampoo' is not known.*short names are adadiag, adadiag\\+\\+, soap"),
        ([{"kind": "Soap", "sides": "three"}], "preconditioners"),
        (["soap", "Soap"], "preconditioners has Soap.* more than once"),
    ],
)
def test_what_is_no_space_is_said(spaces, says):
    with pytest.raises(ConfigError, match=says):
        build({"preconditioners": spaces})


def test_everyone_in_every_space():
    config = build({"policies": ["MGUP", "Magma"], "preconditioners": SPACES})
    found = contenders(config)
    assert [(c.index, c.role, c.of, c.ground) for c in found] == [
        (0, "baseline", None, 0), (1, "policy", 2, 0), (2, "control", 1, 0), (3, "policy", None, 0),
        (4, "rotation", None, 4), (5, "policy", 6, 4), (6, "control", 5, 4), (7, "policy", None, 4),
        (8, "rotation", None, 8), (9, "policy", 10, 8), (10, "control", 9, 8), (11, "policy", None, 8),
    ]  # fmt: skip
    assert found[5].label == "MGUP() in Soap()"
    assert found[8].label == "AdamW in AdaDiag(sides='two', refresh_every=2)"
    assert [c.preconditioner for c in found[:5]] == [None, None, None, None, Soap()]
    assert len({c.slug for c in found}) == 12


def test_the_inside_is_rotated_and_all_number_parameters_alike(tmp_path):
    config = tiny(tmp_path, policies=["MGUP"], preconditioners=SPACES)
    made = [trainer(config, index) for index in range(6)]
    orders = [list(one.names.values()) for one in made]
    assert all(order == orders[0] for order in orders)
    plain, rotated = made[0].optimizer, made[2].optimizer
    assert not isinstance(plain, SelectiveUpdate)
    assert isinstance(rotated, SelectiveUpdate)
    for one in made:
        one.go(never, ignore)
    bases = {
        name for name, p in made[2].model.named_parameters() if any("basis" in str(key) for key in rotated.state[p])
    }
    inside = {name for name, p in made[2].model.named_parameters() if name.startswith("blocks.") and p.ndim == 2}
    assert bases == inside
    assert len({fingerprint(one.model) for one in made}) == 6  # every space and policy is another run


@pytest.mark.parametrize("index", range(1, 6))
def test_a_rotated_run_goes_on_bit_for_bit(tmp_path, index):
    """Stopped after three of seven steps: between two refreshes of either space."""
    config = tiny(tmp_path, policies=["RandomMask"], preconditioners=SPACES, steps=7)
    straight, first, second = (trainer(config, index) for _ in range(3))
    straight.go(never, ignore)
    path = tmp_path / "run.pt"
    assert not first.go(stop_after(3), ignore, path)["complete"]
    second.load(path)
    second.go(never, ignore, path)
    assert fingerprint(second.model) == fingerprint(straight.model)


def test_a_policy_is_judged_against_the_base_in_its_space():
    config = build({"policies": ["MGUP"], "preconditioners": ["soap"], "lr": [0.1], "seeds": 3, "steps": 100})
    finals = {0: 3.0, 1: 2.8, 2: 2.9, 3: 2.0, 4: 2.2, 5: 2.3}
    made = {(index, 0.1): [loss, loss + 0.1, loss + 0.2] for index, loss in finals.items()}
    said = dict(summarise(config, records(config, made)).verdicts)
    assert list(said) == ["MGUP()", "AdamW in Soap()", "MGUP() in Soap()"]
    assert said["MGUP()"].startswith("beats AdamW (-0.2000")
    assert said["AdamW in Soap()"].startswith("beats AdamW (-1.0000")
    assert "control" not in said["AdamW in Soap()"]
    assert said["MGUP() in Soap()"].startswith("is worse than AdamW in Soap() (+0.2000")


def test_steps_are_compared_seed_by_seed():
    """From 4 in a line: to 3 after 100 steps; to 2 the same loss is reached after 50; to 3.5 never."""
    config = build({"preconditioners": ["soap", "adadiag"], "lr": [0.1], "seeds": 2, "steps": 100})
    made = {(0, 0.1): [3.0, 3.0], (1, 0.1): [2.0, 4.0 - 1 / 0.25], (2, 0.1): [2.0, 3.5]}
    rows = {row.contender.index: row for row in summarise(config, records(config, made)).rows}
    assert (rows[1].steps, rows[1].reached, rows[1].speed.mean) == (37.5, 2, 3.0)
    assert rows[1].speed.half == pytest.approx(12.706 * 2**0.5 / 2**0.5, abs=1e-3)
    assert steps_text(rows[1], 2) == "38 (3.00 ± 12.71 ×)"
    assert rows[2].speed is None
    assert steps_text(rows[2], 2) == "50 (1 of 2)"
    assert steps_text(rows[0], 2) == "100"


def test_from_the_command_line(tmp_path, capsys):
    out = tmp_path / "out"
    tiny_settings = ["--set", "model.layers=1", "--set", "model.width=8", "--set", "model.heads=2", "--set",
                     "model.context=8", "--set", "loop.batch=2", "--steps", "4", "--workers", "1"]  # fmt: skip
    code = main(["compare", "--preconditioner", "adadiag++", "--preconditioner", '{"kind": "Soap", "beta": 0.9}',
                 "--seeds", "2", "--lr", "1e-2", "--data", str(text_file(tmp_path)), "--out", str(out),
                 *tiny_settings])  # fmt: skip
    printed = capsys.readouterr().out
    assert code == 0
    results = json.loads((out / "results.json").read_text())
    assert [c["preconditioner"] and c["preconditioner"]["kind"] for c in results["contenders"]] == [
        None, "AdaDiag", "Soap"
    ]  # fmt: skip
    assert results["summary"]["rows"][0]["speed"]["mean"] == 1
    assert "AdamW in Soap(beta=0.9)" in printed
    assert "only the baseline is trained" not in printed


def test_explain_shows_the_space(capsys):
    assert main(["explain", "--preconditioner", "soap"]) == 0
    printed = capsys.readouterr().out
    assert "by Soap()" in printed
    assert main(["explain", "--preconditioner", "nothing"]) == 2
    assert "short names are" in capsys.readouterr().err


def test_a_base_that_cannot_be_rotated_is_said(tmp_path):
    config = tiny(tmp_path, base="ASGD", preconditioners=["soap"])
    with pytest.raises(ConfigError, match=r"Soap\(\) on ASGD: .*keeps iterates"):
        trainer(config, 1)
