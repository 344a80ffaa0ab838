"""The tables of what a step costs are those of the measurement files."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from step_tables import PAGES, RATIOS, filled

from selective.bench.shapes import MODELS

DOCS = Path(__file__).parents[2] / "docs"
AGAIN = "python scripts/step_tables.py writes them again"


@pytest.mark.parametrize("name", PAGES)
def test_the_tables_are_those_of_the_files(name: str) -> None:
    page = (DOCS / name).read_text()
    assert re.findall(r"<!-- steps: .+ -->\n\n", page)
    assert filled(page, DOCS / "measurements") == page, AGAIN


def test_a_file_that_says_otherwise_is_noticed(tmp_path: Path) -> None:
    pages = {name: (DOCS / name).read_text() for name in PAGES}
    files = set(re.findall(r"<!-- steps: (\S+\.json) -->", pages[PAGES[1]]))
    assert len(files) >= len(RATIOS)
    for name in files:
        shutil.copy(DOCS / "measurements" / name, tmp_path / name)
    file = tmp_path / "2026-11-28-cpu-transformer-30m.json"
    content = json.loads(file.read_text())
    row = next(m for m in content["results"][0]["measurements"] if m["name"] == "Cautious")
    row["seconds"] = [2 * seconds for seconds in row["seconds"]]
    file.write_text(json.dumps(content))
    for page, figure in zip(pages.values(), ("6.2 ×", "6.18"), strict=True):
        lines, written = page.splitlines(), filled(page, tmp_path).splitlines()
        changed = [new for old, new in zip(lines, written, strict=True) if old != new]
        assert len(changed) == 1 and f"| {figure} |" in changed[0] and "Cautious" in changed[0]


def test_a_row_that_was_not_timed_has_no_line(tmp_path: Path) -> None:
    name = "2026-11-28-cpu-transformer-30m.json"
    content = json.loads((DOCS / "measurements" / name).read_text())
    row = next(m for m in content["results"][0]["measurements"] if m["name"] == "Magma")
    row["outcome"] = "refused"
    (tmp_path / name).write_text(json.dumps(content))
    assert "| Magma |" not in filled(f"<!-- steps: {name} -->\n\n", tmp_path)


# Rows of two pages, by how they begin, and the steps of the training benchmark whose figures they have.
TRAINING = "2026-11-30-h200-training-llama-34m-later.json"
ROWS = {
    "performance.md": {
        "torch fused": "torch fused",
        "`CautiousMGUP`": "CautiousMGUP",
        "`Cautious`": "Cautious",
        "`AlphaConsistency`": "AlphaConsistency",
        "`MGUP`, exact top-K": "MGUP",
        "`Soap()`, between refreshes": "Soap(cholesky, tf32), no refresh",
        "`Soap()`, a refresh every ten steps": "Soap(cholesky, tf32), refresh every 10",
        '`Soap(solver="qr", precision="float32")`, a refresh every ten steps': "Soap(qr, float32), refresh every 10",
    },
    "guides/muon.md": {
        "bare": "torch Muon, AdamW for the rest",
        '`Dense()`, `capture="fused"`': "Muon, Dense, capture='fused'",
        '`MGUP()`, `capture="fused"`': "Muon, MGUP, capture='fused'",
        '`MGUP()`, `capture="scratch"`': "Muon, MGUP, capture='scratch'",
    },
}


def training_rows(name: str, file: Path) -> list[str]:
    """The lines of a page's table of a step of `llama-34m`, as the file gives them."""
    steps = {m["name"]: m for m in json.loads(file.read_text())["training"][0]["measurements"]}
    lines = []
    for label, row in ((label, steps[step]) for label, step in ROWS[name].items()):
        wall, host, device = (1e3 * row[f"{key}_seconds"] for key in ("median", "host", "device"))
        if name == "performance.md":
            ratio = " " if "Soap" in label else f" {row['host_versus_fused']:.2f} ".replace(" 1.00 ", " 1 ")
            digits = 1 if wall > 10 else 2
            lines.append(f"| {label} |{ratio}| {wall:.{digits}f} | {device:.{digits}f} |")
        else:
            launches = sum(row["launches"].values())
            lines.append(f"| {label} | {wall:.1f} | {host:.1f} | {device:.1f} | {launches:,.0f} |")
    return lines


@pytest.mark.parametrize("name", ROWS)
def test_the_steps_of_llama_34m_are_those_of_their_file(name: str, tmp_path: Path) -> None:
    file, page = DOCS / "measurements" / TRAINING, (DOCS / name).read_text()
    expected = training_rows(name, file)
    assert len(expected) == len(ROWS[name])
    assert [line for line in expected if line not in page] == []
    content = json.loads(file.read_text())
    for row in content["training"][0]["measurements"]:
        row["median_seconds"] *= 1.1
    (tmp_path / TRAINING).write_text(json.dumps(content))
    assert not [line for line in training_rows(name, tmp_path / TRAINING) if line in page]


# The rows of the guide on norm control: a model, how a row begins, and the step whose figures it has.
NORMS_FILE = "2026-12-01-h200-training-norms.json"
NORMS = [
    (f"llama-{size}", f"| `llama-{size}` | {label} |", step)
    for size in ("34m", "110m")
    for label, step in (
        ("torch fused", "torch fused"),
        ("with norm control", "norms kept"),
        ("with norm control and `Cautious()`", "norms kept + Cautious"),
    )
]


def norm_rows(folder: Path) -> list[str]:
    """The lines of the guide's table on what norm control costs, and how fast its kernels are, as the files give it."""
    lines, steps = [], {}
    models = {m["model"]: m["measurements"] for m in json.loads((folder / NORMS_FILE).read_text())["training"]}
    for model, begins, step in NORMS:
        steps = {m["name"]: m for m in models[model]}
        times = (f"{1e3 * steps[step][f'{key}_seconds']:.2f}" for key in ("median", "host", "device"))
        lines.append(f"{begins} {' | '.join(times)} |")
    matrices = sum(math.prod(shape) for name, shape in MODELS["llama-110m"] if name == "matrices")
    longer = steps["norms kept"]["device_seconds"] - steps["torch fused"]["device_seconds"]
    return [*lines, f"at {28 * matrices / longer / 1e12:.1f} TB/s (`llama-110m`)"]


def test_what_norm_control_costs_is_what_its_files_say(tmp_path: Path) -> None:
    page = (DOCS / "guides" / "norm-control.md").read_text()
    assert [line for line in norm_rows(DOCS / "measurements") if line not in page] == []
    content = json.loads((DOCS / "measurements" / NORMS_FILE).read_text())
    for row in (row for model in content["training"] for row in model["measurements"]):
        row["median_seconds"] *= 1.1
    (tmp_path / NORMS_FILE).write_text(json.dumps(content))
    assert len([line for line in norm_rows(tmp_path) if line not in page]) == len(NORMS)
