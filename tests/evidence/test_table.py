"""The tables of scripts/evidence, of made-up records, and the page that has them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from evidence.page import filled, marks
from evidence.rows import Row
from evidence.runs import Results, Run
from evidence.table import TABLES, Comparison

TASK = "python-34m"


def record(setup: str, lr: float, seed: int, losses: list[float], seconds: float = 10.0, **more: Any) -> dict[str, Any]:
    """A run of 100 steps, and 50 more for each loss beyond the third."""
    steps = [50 * index for index in range(len(losses))]
    return {
        **vars(Run(TASK, setup, lr, seed)), "steps": steps[-1], "diverged": False, "alone": True,
        "validation": {"step": steps, "loss": losses},
        "seconds_to_validation": [seconds * step / 100 for step in steps], **more,
    }  # fmt: skip


@pytest.fixture
def records() -> list[dict[str, Any]]:
    runs = []
    for seed in (0, 1, 2):
        runs += [
            record("AdamW", 2e-3, seed, [9, 8, 3 + seed]),
            record("AdamW", 2e-3, seed, [5, 4, 3, 2.5], part=1.5),
            record("Cautious on AdamW", 1e-3, seed, [9, 3 + seed, 2 + seed], seconds=15),
            record("random like Cautious on AdamW", 1e-3, seed, [9, 9, 4 + seed]),
        ]
    runs += [record("AdamW", lr, 0, [5, 5, 5]) for lr in (1e-3, 4e-3)]
    return runs


def cells(results: list[dict[str, Any]], name: str = f"{TASK} AdamW") -> dict[str, list[str]]:
    lines = TABLES[name](Results(results))[2:]
    return {row[0]: row[1:] for row in ([cell.strip() for cell in line[1:-1].split("|")] for line in lines)}


def test_a_row_at_its_best_rate(records: list[dict[str, Any]]) -> None:
    table = cells(records)
    # Student's interval of three values that are 1 apart: 4.3027 · 1 / √3
    assert table["AdamW"] == ["0.002", "3", "4.000 ± 2.484", "–", "–", "–", "–", "100.0"]
    # 50 steps of 100; 7.5 s of 10 s
    assert table["Cautious on AdamW"] == [
        "0.001 (edge)", "3", "3.000 ± 2.484", "−1.000 ± 0.000", "−2.000 ± 0.000", "2.00 ± 0.00", "1.33 ± 0.00", "150.0"
    ]  # fmt: skip
    assert table["random like Cautious on AdamW"][3:6] == ["+1.000 ± 0.000", "–", "in 0 of 3 seeds"]
    assert table["AdamW, 1.5 × the steps"][:4] == ["0.002 (not swept)", "3", "2.500 ± 0.000", "−1.500 ± 2.484"]
    assert table["MGUP mild on AdamW"] == ["–", "–", "not run", "–", "–", "–", "–", "–"]


def test_times_need_the_device_alone(records: list[dict[str, Any]]) -> None:
    for run in records:
        run["alone"] = run["seed"] == 0
    assert cells(records)["Cautious on AdamW"][5:] == ["2.00 ± 0.00", "1.33", "150.0"]


def test_runs_that_are_missing_or_diverged_are_said(records: list[dict[str, Any]]) -> None:
    without = [run for run in records if not run["setup"].startswith("random")]
    assert cells(without)["Cautious on AdamW"][4] == "control not run"
    records[-3]["diverged"] = True  # seed 2 of the control
    assert cells(records)["random like Cautious on AdamW"][2] == "a seed diverged"
    assert cells(records)["Cautious on AdamW"][4] == "−2.000 ± 0.000 (n = 2)"
    everything = [run | {"diverged": True} for run in records]
    assert cells(everything)["AdamW"][2] == "diverged at every rate"


def test_accuracy_stands_beside_the_loss() -> None:
    def tuned(setup: str, seed: int, **more: Any) -> dict[str, Any]:
        return record(setup, 1e-4, seed, [3, 2, 1 + seed]) | {"task": "foldoc-minilm"} | more

    runs = [tuned("AdamW", seed, measures={"accuracy": 0.5 + 0.01 * seed}) for seed in (0, 1, 2)]
    runs += [tuned("Cautious on AdamW", seed, measures={"accuracy": 0.52 + 0.01 * seed}) for seed in (0, 1, 2)]
    runs.append(tuned("MGUP mild on AdamW", 0))
    table = cells(runs, "foldoc-minilm")
    assert TABLES["foldoc-minilm"](Results(runs))[0].endswith("| ms a step | accuracy, % | accuracy against the base |")
    assert table["AdamW"][-2:] == ["51.00 ± 2.48", "–"]
    assert table["Cautious on AdamW"][-2:] == ["53.00 ± 2.48", "+2.00 ± 0.00"]
    assert table["MGUP mild on AdamW"][-2:] == ["–", "–"], "a record from before has no accuracy"
    assert table["MGUP official on AdamW"][-2:] == ["–", "–"]
    assert {len(row) for row in table.values()} == {10}


def test_all_rates(records: list[dict[str, Any]]) -> None:
    records.append(record("AdamW", 8e-3, 0, [5.0], diverged=True))
    rates = cells(records, f"{TASK} AdamW rates")
    head = TABLES[f"{TASK} AdamW rates"](Results(records))[0]
    assert head == "| setup | 0.00075 | 0.001 | 0.0015 | 0.002 | 0.003 | 0.004 | 0.006 | 0.008 |"
    assert rates["AdamW"] == ["–", "5.000", "–", "**3.000**", "–", "5.000", "–", "diverged"]


def two_rates(lr: float, rest: float, losses: list[float], setup: str = "Muon") -> list[dict[str, Any]]:
    """The runs of as many seeds as there are losses."""
    return [record(setup, lr, seed, [9, 5, loss], rest_lr=rest) for seed, loss in enumerate(losses)]


def test_a_pair_of_rates_is_chosen_by_the_mean_and_marked_until_its_sweep_is_done() -> None:
    name = f"{TASK} Muon"
    sides = [run for lr, rest in ((1e-2, 4e-3), (4e-2, 4e-3), (2e-2, 2e-3), (2e-2, 8e-3), (2e-2, 1.6e-2))
             for run in two_rates(lr, rest, [2.1])]  # fmt: skip
    first = two_rates(2e-2, 4e-3, [2.0, 2.3, 2.3])
    assert cells([*first, *sides[1:]], name)["Muon"][0] == "0.02, rest 0.004 (sweep unfinished)"
    assert cells([*first, *sides], name)["Muon"][:3] == ["0.02, rest 0.004", "3", "2.200 ± 0.430"]
    higher = [*sides[:3], *sides[4:], *two_rates(2e-2, 8e-3, [2.01, 2.1, 2.1])]
    assert cells([*first, *higher], name)["Muon"][:3] == ["0.02, rest 0.008", "3", "2.070 ± 0.129"]
    tied = [*sides[:3], *sides[4:], *two_rates(2e-2, 8e-3, [2.0005])]
    assert cells([*first, *tied], name)["Muon"][:2] == ["0.02, rest 0.004 (sweep unfinished)", "3"], (
        "the tie lacks seeds"
    )
    lower = [*sides[:3], *sides[4:], *two_rates(2e-2, 8e-3, [1.9])]
    assert cells([*first, *lower], name)["Muon"][:2] == ["0.02, rest 0.004 (sweep unfinished)", "3"], "it lacks seeds"


def test_a_row_at_another_s_rates_is_marked_and_follows_them() -> None:
    ours = "Muon, by our kernels"
    runs = [*two_rates(2e-2, 4e-3, [2.0]), *two_rates(2e-2, 4e-3, [2.1], ours), *two_rates(4e-2, 4e-3, [1.5], ours)]
    assert cells(runs, f"{TASK} Muon")[ours][:3] == ["0.02, rest 0.004 (not swept)", "1", "2.100"]
    assert cells(two_rates(2e-2, 4e-3, [2.0], ours), f"{TASK} Muon")[ours][2] == "not run", "the other has no rates"
    table = cells([*runs, *two_rates(2e-2, 4e-3, [2.2] * 3, "Muon, whitened")], f"{TASK} Muon")
    assert table["Muon, whitened"][3] == "+0.200 (n = 1)", "fewer pairs than seeds are said"


def test_a_page_is_filled_and_a_changed_record_is_noticed(records: list[dict[str, Any]]) -> None:
    page = f"# Title\n\n<!-- evidence: {TASK} AdamW -->\n\n| old |\n\nText.\n\n<!-- evidence: {TASK} Lion -->\n\nEnd.\n"
    assert marks(page) == [f"{TASK} AdamW", f"{TASK} Lion"]
    written = filled(page, Results(records))
    assert "| old |" not in written
    assert "\n\nText.\n" in written
    assert written.endswith("|\n\nEnd.\n")
    assert filled(written, Results(records)) == written
    changed = copy.deepcopy(records)
    changed[0]["validation"]["loss"][-1] -= 0.01
    assert filled(written, Results(changed)) != written
    with pytest.raises(KeyError):
        filled("<!-- evidence: something else -->\n\n", Results(records))


def test_controls_have_no_control() -> None:
    assert Row("Cautious on AdamW", "AdamW").control == Row("random like Cautious on AdamW", "AdamW")
    assert Row("random like Cautious on AdamW", "AdamW").control is None
    assert Row("AdamW", "AdamW").control is None
    assert Row("Cautious on AdamW", "AdamW", part=0.5).control is None, "the control has all steps"
    assert Comparison(Results([]), TASK).point(Row("AdamW", "AdamW")) is None
