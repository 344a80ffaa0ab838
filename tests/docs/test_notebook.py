"""examples/tour.ipynb runs from top to bottom, and its outputs are what it prints."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from documentation import notebook
from optional import THEIR_WARNINGS

from selective import Policy

TOUR = Path(__file__).parents[2] / "examples" / "tour.ipynb"
CELLS = [
    {"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["# Title\n", "text"]},
    {"cell_type": "code", "id": "b", "metadata": {}, "source": ["x = 3\n", "print(x)"], "execution_count": None},
    {"cell_type": "code", "id": "c", "metadata": {}, "source": ["class A:\n", "    pass"], "execution_count": None},
    {"cell_type": "code", "id": "d", "metadata": {}, "source": ["print(x + 1, A.__name__)"], "execution_count": None},
]


@pytest.fixture
def _as_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In an empty folder; policies that the notebook defines are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    registry, threads = dict(Policy._registry), torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)
    Policy._registry.clear()
    Policy._registry.update(registry)


@pytest.mark.slow
@pytest.mark.filterwarnings(*(f"ignore:{re.escape(message)}" for message in THEIR_WARNINGS))
@pytest.mark.usefixtures("_as_a_reader")
def test_the_outputs_of_the_tour_are_what_it_prints() -> None:
    tour = notebook.read(TOUR)
    assert notebook.printed(tour, TOUR.name) == notebook.stored(tour), (
        "run: python scripts/documentation/notebook.py examples/tour.ipynb --write"
    )


def test_the_file_is_as_the_script_writes_it() -> None:
    text = TOUR.read_text()
    tour = notebook.read(TOUR)
    written = notebook.with_outputs(tour, notebook.stored(tour))
    assert json.dumps(written, indent=1, ensure_ascii=False) + "\n" == text
    ids = [cell["id"] for cell in tour["cells"]]
    assert len(ids) == len(set(ids))
    assert all(cell.keys() >= {"cell_type", "id", "metadata", "source"} for cell in tour["cells"])
    assert tour["nbformat_minor"] >= 5  # cells have an id from then on


def small() -> dict[str, Any]:
    cells = [{**cell, "outputs": []} if cell["cell_type"] == "code" else cell for cell in CELLS]
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def test_cells_share_a_namespace_and_each_has_its_output() -> None:
    texts = notebook.printed(small(), "small")
    assert texts == ["3\n", "", "4 A\n"]
    written = notebook.with_outputs(small(), texts)
    assert notebook.stored(written) == texts
    assert notebook.stored(small()) == ["", "", ""]  # what the comparison above would notice
    counts = [cell["execution_count"] for cell in notebook.code_cells(written)]
    assert counts == [1, 2, 3]
    assert [bool(cell["outputs"]) for cell in notebook.code_cells(written)] == [True, False, True]


def test_a_cell_that_fails_is_named() -> None:
    broken = small()
    broken["cells"][2]["source"] = ["1 / 0"]
    with pytest.raises(ZeroDivisionError) as caught:
        notebook.printed(broken, "small")
    assert caught.traceback[-1].path == "small, code cell 2" or "code cell 2" in str(caught.traceback[-1])


def test_a_notebook_as_a_part_of_a_page() -> None:
    text = notebook.as_markdown(notebook.with_outputs(small(), ["3\n", "", "4 A\n"]))
    assert text.startswith(
        "### Title\ntext\n\n```python\nx = 3\nprint(x)\n```\n\n<!-- output -->\n```text\n3\n```\n\n```python\nclass A:"
    )
    assert text.count("```text") == 2


def test_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.ipynb").write_text(json.dumps({**small(), "nbformat": 3}))
    with pytest.raises(ValueError, match="nbformat is 3, must be 4"):
        notebook.read(tmp_path / "old.ipynb")
