"""Draws the charts of docs/performance.md again, each from the measurement files that it names.

    python scripts/charts.py            draws docs/pictures/*.svg
    python scripts/charts.py --check    exits with 1 if a picture says something else than its files

A figure is the median, over the rounds of a benchmark, of a row's time over that of torch's fused AdamW in the same
round.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from documentation.bars import Bar, chart, figures_in

DOCS = Path(__file__).resolve().parents[1] / "docs"
FUSED = "torch AdamW, fused=True"


@dataclass(frozen=True)
class Chart:
    title: str
    files: tuple[str, ...]  # of measurements/: a row's figure is taken from each file that has the row
    rows: dict[str, str]  # the name of a row in the files, and its label; others than ours begin with a *
    digits: int = 2


POLICIES = {
    "CautiousMGUP": "CautiousMGUP()",
    "MGUP (sampled)": 'MGUP(quantile="sampled")',
    "MGUP": "MGUP()",
    "Cautious": "Cautious()",
    "AlphaConsistency": "AlphaConsistency()",
}
FOREACH = {"torch foreach": "*torch AdamW, foreach=True"}
CHARTS = {
    "step-h200": Chart(
        "A step of 1.1B parameters on an H200", ("2026-11-29-h200-llama-1b-later.json",), {**POLICIES, **FOREACH}
    ),
    "step-h200-bfloat16": Chart(
        "The same in bfloat16",
        ("2026-11-30-h200-llama-1b-bfloat16-later.json",),
        {**{row: POLICIES[row] for row in ("CautiousMGUP", "MGUP (sampled)", "MGUP")}, **FOREACH},
    ),
    "step-cpu": Chart(
        "A step of 29M parameters on 2 CPU cores",
        ("2026-11-28-cpu-transformer-30m.json",),
        {**POLICIES, "Grams": "Grams()", **FOREACH},
        1,
    ),
    "step-others": Chart(
        "At GPT-2's size on an H200, beside others",
        ("2026-11-28-h200-gpt2-peers.json", "2026-11-28-h200-gpt2-peers-more.json"),
        {
            "CautiousMGUP": "CautiousMGUP()",
            "MGUP": "MGUP()",
            **FOREACH,
            "timm AdamW": "*timm AdamW",
            "pytorch_optimizer LaProp": "*pytorch_optimizer LaProp",
            "HeavyBall AdamW": "*HeavyBall AdamW",
            "optimi AdamW": "*optimi AdamW",
            "timm AdamW, caution": "*timm AdamW, caution=True",
            "pytorch_optimizer LaProp, cautious": "*pytorch_optimizer LaProp, cautious=True",
        },
        1,
    ),
}


def versus_fused(row: dict[str, Any]) -> float:
    """The median over the rounds of a row's time over that of torch's fused AdamW."""
    return median(a / b for a, b in zip(row["seconds"], row["fused_seconds"], strict=True))


def bars(one: Chart, measurements: Path) -> list[Bar]:
    """The rows of a chart, from the files in this folder."""
    runs = [json.loads((measurements / name).read_text())["results"][0]["measurements"] for name in one.files]
    drawn = []
    for row, label in one.rows.items():
        rows = [measured for run in runs for measured in run if measured["name"] == row]
        figures = sorted(map(versus_fused, rows))
        drawn.append(Bar(label.removeprefix("*"), figures, ours=not label.startswith("*")))
    return drawn


def draw(one: Chart, measurements: Path) -> str:
    unit = f"times as long as {FUSED} (dashed)"
    return chart(one.title, unit, bars(one, measurements), digits=one.digits, line=1)


def differing(docs: Path) -> list[str]:
    """A line for each figure that a picture has otherwise than the files, and for each picture that is missing."""
    lines = []
    for name, one in CHARTS.items():
        picture = docs / "pictures" / f"{name}.svg"
        said = figures_in(picture.read_text()) if picture.exists() else {}
        measured = {bar.label: bar.text(one.digits) for bar in bars(one, docs / "measurements")}
        for label in sorted({*said, *measured}):
            if said.get(label) != measured.get(label):
                lines.append(f"{picture.name}: {label}: {said.get(label)}, but the files have {measured.get(label)}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the charts of docs/performance.md.")
    parser.add_argument("--check", action="store_true", help="compare instead of drawing")
    if parser.parse_args().check:
        lines = differing(DOCS)
        sys.exit("\n".join([*lines, "python scripts/charts.py draws them again"]) if lines else 0)
    for name, one in CHARTS.items():
        (DOCS / "pictures" / f"{name}.svg").write_text(draw(one, DOCS / "measurements"))


if __name__ == "__main__":
    main()
