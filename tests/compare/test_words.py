"""The last line of a comparison: the interval decides what it may say."""

from __future__ import annotations

import json

import pytest
from compare_helpers import TINY, records, text_file

from selective.cli import main
from selective.compare import build, summarise
from selective.compare.config import merge
from selective.compare.words import in_plain_words, so_far

CONFIG = build({"policies": ["MGUP"], "lr": [0.1, 1.0, 2.0], "seeds": 3, "steps": 100})
BASE = {(0, 0.1): [2.5, 2.6, 2.7], (0, 1.0): [2.0, 2.1, 2.2], (0, 2.0): [3.0, 3.1, 3.2]}
HELPED = "MGUP() helped: over 3 seeds, with 95 % intervals, its held-out loss is 0.100 ± 0.000 lower than that of AdamW"
MATTERS = "it matters which coordinates are selected"
NOT_SHOWN = "it is not shown to matter which coordinates are selected"


def said(policy, control, config=CONFIG, base=BASE) -> list[str]:
    others = {(index, lr): [4.0] * len(policy) for index in (1, 2) for lr in (0.1, 2.0) if lr in config.lr}
    found = records(config, {**base, **others, (1, 1.0): policy, (2, 1.0): control})
    return in_plain_words(summarise(config, found))


@pytest.mark.parametrize(
    ("policy", "control", "begins", "goes_on"),
    [
        ([1.9, 2.0, 2.1], [2.0, 2.1, 2.2], HELPED, f"0.100 ± 0.000 lower than that of a random mask of the same share "
         f"and norm: {MATTERS}."),
        ([1.9, 2.0, 2.1], [1.9, 2.01, 2.09], HELPED, NOT_SHOWN),
        ([1.9, 2.0, 2.1], [1.8, 1.9, 2.0], HELPED, "0.100 ± 0.000 higher than that of a random mask of the same share "
         "and norm: the choice of coordinates did not help."),
        ([1.9, 2.0, 2.1], [None, 2.0, None], HELPED, MATTERS),  # the control at its next best rate
        ([2.0, 2.25, 2.1], [2.0, 2.1, 2.2], "MGUP(): no difference shown. Over 3 seeds", "differs by +0.017 ± 0.313"),
        ([2.0, 2.2, 2.1], [2.5, 2.6, 2.7], "MGUP(): no difference shown.", MATTERS),
        ([2.4, 2.5, 2.6], [2.4, 2.6, 2.5], "MGUP() hurt: over 3 seeds", "0.400 ± 0.000 higher than that of AdamW."),
        ([2.4, 2.5, 2.6], [2.9, 3.0, 3.1], "MGUP() hurt: over 3 seeds", "0.400 ± 0.000 higher than that of AdamW."),
    ],
)  # fmt: skip
def test_the_interval_decides(policy, control, begins, goes_on) -> None:
    (line,) = said(policy, control)
    assert line.startswith(begins)
    assert goes_on in line
    words = [word for word in ("helped:", "no difference shown", "hurt:") if word in line]
    assert len(words) == 1
    assert (MATTERS in line) + (NOT_SHOWN in line) <= 1
    assert "edge" not in line


@pytest.mark.parametrize(("wide", "word"), [(0.03, "helped"), (0.05, "no difference shown")])
def test_the_same_mean_with_a_wider_interval_says_less(wide, word) -> None:
    """Differences of -0.1 ± wide: Student's factor of three is 4.303, so that 0.03 gives 0.075, and 0.05 0.124."""
    policy = [2.0 - 0.1 - wide, 2.1 - 0.1, 2.2 - 0.1 + wide]
    assert word in said(policy, [2.5, 2.6, 2.7])[0]


def test_a_baseline_at_the_edge_of_its_rates_is_said() -> None:
    edge = {**BASE, (0, 2.0): [1.99, 2.09, 2.19]}
    assert said([1.9, 2.0, 2.1], [2.0, 2.1, 2.2], base=edge)[0].endswith(
        "AdamW is best at the edge of its learning rates: a better one may lie beyond."
    )


def test_one_seed_is_no_evidence() -> None:
    config = build({"policies": ["MGUP"], "lr": [1.0], "seeds": 1, "steps": 100})
    assert said([1.9], [1.95], config, {(0, 1.0): [2.0]}) == [
        "One seed is no evidence: here the held-out loss of MGUP() is 0.100 lower than that of AdamW, 0.050 lower than "
        "that of a random mask of the same share and norm. Run five."
    ]


def test_what_diverged_is_said() -> None:
    config = build({"policies": ["MGUP"], "lr": [1.0], "controls": False, "seeds": 2, "steps": 100})
    (own,) = in_plain_words(summarise(config, records(config, {(0, 1.0): [2.0, 2.0], (1, 1.0): [None, None]})))
    assert own == "MGUP() diverged: at every learning rate its loss stopped being a number."
    (other,) = in_plain_words(summarise(config, records(config, {(0, 1.0): [None, None], (1, 1.0): [2.0, 2.1]})))
    assert other == "MGUP(): nothing can be said, because AdamW diverged at every learning rate."


def test_the_first_policy_comes_last() -> None:
    config = build(
        {"policies": ["MGUP", "Cautious"], "preconditioners": ["soap"], "policies_in_spaces": False, "controls": False,
         "lr": [1.0], "seeds": 2}
    )  # fmt: skip
    found = records(config, {(i, 1.0): [2.0 - 0.1 * i, 2.1 - 0.1 * i] for i in range(4)})
    assert [line.partition(" helped")[0] for line in in_plain_words(summarise(config, found))] == [
        "AdamW in Soap()", "Cautious()", "MGUP()",
    ]  # fmt: skip


def test_so_far() -> None:
    made = records(CONFIG, {(i, lr): [2.0 - 0.1 * i] * 3 for i in (0, 1, 2) for lr in CONFIG.lr})
    for record in made:
        record["complete"] = record["seed"] < 2
    assert so_far(CONFIG, summarise(CONFIG, made)) == (
        "seed 2 of 3: so far MGUP() -0.100 against AdamW and +0.100 against its random control (held-out loss; below 0 "
        "is better)"
    )


def test_in_the_terminal(tmp_path, capsys) -> None:
    """A line after each seed but the last, of which the table speaks; and the last line of all."""
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(merge(TINY, {"data": {"file": str(text_file(tmp_path))}, "controls": True})))
    arguments = ["compare", "--config", str(path), "--policy", "Cautious", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--seeds", "3", "--first-seed", "7"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [line.partition(":")[0] for line in lines if line.startswith("seed ")] == ["seed 1 of 3", "seed 2 of 3"]
    assert "Cautious()" in lines[-1]
    assert "over 3 seeds" in lines[-1].lower()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["summary"]["seeds"] == [7, 8, 9]


def test_a_first_seed_goes_with_a_count(tmp_path, capsys) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"seeds": [0, 1]}))
    assert main(["compare", "--config", str(path), "--first-seed", "5", "--out", str(tmp_path / "out")]) == 2
    assert "--first-seed 5: the seeds are a list (0, 1); give a count with --seeds" in capsys.readouterr().err
