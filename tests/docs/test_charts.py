"""The charts say what the measurement files say, and a page shows each of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from charts import CHARTS, bars, differing, draw
from documentation.bars import WIDTH, Bar, chart, figures_in

DOCS = Path(__file__).parents[2] / "docs"


def test_the_pictures_have_the_figures_of_the_files() -> None:
    assert differing(DOCS) == [], "python scripts/charts.py draws them again"


def test_a_file_that_says_otherwise_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "measurements").mkdir()
    for one in CHARTS.values():
        for name in one.files:
            shutil.copy(DOCS / "measurements" / name, tmp_path / "measurements" / name)
    (tmp_path / "pictures").mkdir()
    for name in CHARTS:
        shutil.copy(DOCS / "pictures" / f"{name}.svg", tmp_path / "pictures" / f"{name}.svg")
    assert differing(tmp_path) == []
    file = tmp_path / "measurements" / CHARTS["step-cpu"].files[0]
    content = json.loads(file.read_text())
    row = next(m for m in content["results"][0]["measurements"] if m["name"] == "Grams")
    row["seconds"] = [2 * seconds for seconds in row["seconds"]]
    file.write_text(json.dumps(content))
    (tmp_path / "pictures" / "step-others.svg").unlink()
    lines = differing(tmp_path)
    assert lines[0].startswith("step-cpu.svg: Grams(): ")
    assert {line.partition(":")[0] for line in lines} == {"step-cpu.svg", "step-others.svg"}
    assert len(lines) == 1 + len(CHARTS["step-others"].rows)


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_keeps_inside_of_its_picture(name: str) -> None:
    """Estimated by the width of a letter, at most 0.62 of the size in the fonts that browsers take for system-ui."""
    root = ElementTree.fromstring(draw(CHARTS[name], DOCS / "measurements"))
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        size = 12 if text.attrib["class"] == "unit" else 14
        assert float(text.attrib["x"]) + 0.62 * size * len(text.text or "") <= WIDTH, text.text
    assert len(figures_in(draw(CHARTS[name], DOCS / "measurements"))) == len(CHARTS[name].rows)


def test_every_chart_is_on_a_page() -> None:
    pages = "".join(page.read_text() for page in DOCS.rglob("*.md"))
    assert [name for name in CHARTS if f"pictures/{name}.svg)" not in pages] == []


def test_two_runs_are_a_range() -> None:
    svg = chart("a & b", "of c", [Bar("d < e", [2, 1.5]), Bar("f", [3], ours=False)], digits=1, line=1)
    assert figures_in(svg) == {"d < e": "2.0 and 1.5", "f": "3.0"}
    assert 'class="mark"' in svg and 'class="other"' in svg and 'class="line"' in svg
    with pytest.raises(ValueError, match="positive"):
        chart("a", "b", [], digits=1)
    assert [len(bar.figures) for bar in bars(CHARTS["step-others"], DOCS / "measurements")][:4] == [2, 2, 2, 1]
