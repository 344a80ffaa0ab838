"""The tables of what a step costs are those of the measurement files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from step_tables import PAGES, RATIOS, filled

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
