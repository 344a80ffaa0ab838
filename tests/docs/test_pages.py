"""Links and anchors as they are in the repository; the bases in docs/reference/bases.md against measurements."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from base_optimizers import BASES, build, make_params

import selective
from selective import Cautious
from selective.capture.choose import choose_capture

ROOT = Path(__file__).parents[2]
COLUMNS = 72  # of a line of code: the site shows as many at 1,280 pixels, and a forge too
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", plain, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            broken.append(target)
        elif anchor and anchor not in anchors(file.read_text()):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One two\n[a](#one-two) [b](#one) [c](none.md) [d](page.md#one-two) `[e](not.md)`\n")
    assert broken_links(page) == ["#one", "none.md"]


def lines_that_are_too_long(text: str) -> list[str]:
    """The number and the length of each line of code that does not fit beside the nav. What code prints is wrapped."""
    lines, language = [], None
    for number, line in enumerate(text.splitlines(), 1):
        if fence := re.match(r"^```(\w*)", line):
            language = fence[1] if language is None else None
        elif language in ("python", "bash", "diff", "yaml") and len(line) > COLUMNS:
            lines.append(f"line {number}: {len(line)} columns")
    return lines


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_fits_the_page(page: Path) -> None:
    assert lines_that_are_too_long(page.read_text()) == []


def test_a_line_of_code_that_is_too_long_is_noticed() -> None:
    long = "x" * (COLUMNS + 1)
    text = f"{long}\n```python\n{long}\n{long[1:]}\n```\n{long}\n```text\n{long}\n```\n"
    assert lines_that_are_too_long(text) == ["line 3: 73 columns"]


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    docs = ROOT / "docs"
    pages = [str(p.relative_to(docs)) for p in PAGES if p.is_relative_to(docs) and p != docs / "index.md"]
    entries = [name for name in pages if not name.startswith("reference/")]  # the reference has an index of its own
    missing = [name for name in [*entries, "reference/index.md"] if f"({name})" not in index]
    assert missing == []


def capture_table() -> list[str]:
    """The rows of docs/reference/bases.md's table, measured."""
    rows = []
    for name, base in BASES.items():
        ways = []
        for dtype in (torch.float32, torch.bfloat16):
            optimizer = build(base, make_params(base, dtype))
            group = optimizer.param_groups[0]
            capture = choose_capture(optimizer, group, Cautious(), "auto", False)
            ways.append(capture.way)
        key = capture.facts.momentum_key
        module = type(optimizer).__module__.partition(".")[0]
        decay = capture.facts.decay_rule or capture.facts.decay
        rows.append(
            f"| {name} | {module} {type(optimizer).__name__} | {ways[0]} | {ways[1]} | {decay} | "
            f"{f'`{key}`' if key else 'none'} |"
        )
    return rows


def test_the_table_of_bases_is_what_is_measured() -> None:
    page = (ROOT / "docs" / "reference" / "bases.md").read_text()
    table = page.partition("<!-- bases -->\n\n")[2].partition("\n\n")[0].splitlines()[2:]
    assert table == capture_table()


def test_every_policy_has_a_section() -> None:
    titles = anchors((ROOT / "docs" / "reference" / "rules.md").read_text())
    named = [n for n in selective.__all__ if inspect.isclass(getattr(selective, n))]
    kinds = (selective.Policy, selective.Selection, selective.Strength)
    parts = [n for n in named if issubclass(getattr(selective, n), kinds) and getattr(selective, n) not in kinds]
    assert [n for n in parts if n.lower() not in titles] == []
