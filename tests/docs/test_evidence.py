"""The tables of docs/evidence.md about the demo, against what its measurement files say."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from demo_results import best_rows, less_time, summary_of

from selective.compare.intervals import Interval, t_interval

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "evidence.md").read_text()
DEMO = "0 to 4, the demo"
FOUND = {
    DEMO: "2026-11-30-demo.json",
    "10 to 14, fresh": "2026-11-30-demo-fresh-seeds.json",
    "100 to 102, for its settings": "2026-11-30-demo-settle.json",
}
NAMES = {0: "AdamW", 1: "`Cautious()`", 2: "its random control", 3: "AdamW in `Soap()`"}


@pytest.fixture
def results() -> dict[str, Any]:
    folder = ROOT / "docs" / "measurements"
    return {seeds: json.loads((folder / name).read_text()) for seeds, name in FOUND.items()}


def said(found: Interval | None, digits: int, sign: str = "") -> str:
    assert found is not None and found.half is not None
    return f"{found.mean:{sign}.{digits}f} ± {found.half:.{digits}f}".replace("-", "−")


def demo_rows(result: dict[str, Any]) -> list[str]:
    lines = []
    for index, row in best_rows(summary_of(result)).items():
        cells = [NAMES[index], f"{row.lr:g}", said(row.loss, 3)]
        if index:
            seeds = len(result["config"]["seeds"])
            there = [f"in {row.reached} of {seeds} seeds", ""]  # AdamW's loss was not reached in the others
            if row.reached == seeds:
                there = [said(row.speed, 2), said(less_time(result, index), 2)]
            cells += [said(row.difference, 3, "+"), *there]
        lines.append(f"| {' | '.join(cells)} |".replace("  |", " |") + ("" if index else " | | |"))
    return lines


def seed_rows(results: dict[str, Any]) -> list[str]:
    lines = []
    for seeds, result in results.items():
        cautious, soap = summary_of(result).found
        cells = [said(one, 3, "+") for one in (cautious.against_base, cautious.against_control, soap.against_base)]
        lines.append(f"| {seeds} | {' | '.join(cells)} |")
    return lines


def table(mark: str) -> list[str]:
    return PAGE.partition(f"<!-- {mark} -->\n\n")[2].partition("\n\n")[0].splitlines()[2:]


def test_the_tables_are_those_of_the_files(results: dict[str, Any]) -> None:
    assert table("demo") == demo_rows(results[DEMO])
    assert table("seeds") == seed_rows(results)


def test_a_file_that_says_otherwise_is_noticed(results: dict[str, Any]) -> None:
    for seeds in FOUND:
        changed = copy.deepcopy(results)
        for run in changed[seeds]["runs"]:
            if run["contender"]:
                run["validation"]["loss"][-1] -= 0.01
        assert table("seeds") != seed_rows(changed)
        assert (table("demo") == demo_rows(changed[DEMO])) == (seeds != DEMO)


def test_what_the_page_says_of_the_verdicts_and_of_the_best_rates(results: dict[str, Any]) -> None:
    text = " ".join(PAGE.split())
    settle = results["100 to 102, for its settings"]
    best = best_rows(summary_of(settle))
    assert "Each best rate lay between two that were worse. `Soap()` was best at 0.004." in text
    assert [best[index].lr for index in NAMES] == [0.0014, 0.002, 0.0014, 0.004]
    assert all(row.lr not in (min(row.contender.rates), max(row.contender.rates)) for row in best.values())
    for result in results.values():  # the page says that all sets of seeds have the same verdicts
        cautious, soap = summary_of(result).found
        assert [cautious.against_base.sign, cautious.against_control.sign, soap.against_base.sign] == [-1] * 3


def test_the_table_of_selective_decay_is_what_its_runs_give() -> None:
    """Final losses of AdamW, `CautiousDecay` and its random control by seed, at the rate of which there are three."""
    folder, lr = ROOT / "docs" / "measurements" / "decay", 1.5e-3
    losses: dict[str, list[float]] = {}
    for file in sorted(folder.glob("*-seed*.json")):  # by seed within each setup
        record = json.loads(file.read_text())
        if record["lr"] == lr:
            losses.setdefault(record["setup"], []).append(record["validation"]["loss"][-1])
    base, cautious = losses["AdamW"], losses["AdamW with CautiousDecay"]
    control = losses["random like AdamW with CautiousDecay"]
    assert len(base) == len(cautious) == len(control) == 3

    def against(these: list[float], those: list[float]) -> str:
        return said(t_interval([a - b for a, b in zip(these, those, strict=True)]), 3, "+")

    rows = [
        f"| decay everywhere | {said(t_interval(base), 3)} | | |",
        f"| `CautiousDecay()` | {said(t_interval(cautious), 3)} | {against(cautious, base)} | "
        f"{against(cautious, control)} |",
        f"| `RandomDecay()` | {said(t_interval(control), 3)} | {against(control, base)} | |",
    ]
    page = (ROOT / "docs" / "guides" / "decay.md").read_text()
    start = page.index("<!-- from measurements/decay -->")
    assert page[start:].split("\n\n")[1].splitlines()[2:] == rows
