"""The site: it builds without a warning, and dead links, dead anchors and forgotten pages are warnings."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documentation.check import problems
from documentation.keywords import KEYWORDS, with_entries
from documentation.pages import NAV, prepared
from documentation.reference import public_names
from site_search import node, search

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def build(docs: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """As `make docs` does, away from the root."""
    if not all(importlib.util.find_spec(name) for name in ("sphinx", "myst_parser", "furo", "sphinx_copybutton")):
        assert not os.environ.get("CI"), "CI installs the extra `docs`"
        pytest.skip("the site is built with the extra `docs`, which is not installed")
    # Sphinx makes millions of objects that live until it ends: without garbage collections it takes a third less time.
    code = "import gc, sys; gc.disable(); from sphinx.cmd.build import main; sys.exit(main(sys.argv[1:]))"
    options = ["-W", "--keep-going", "-q", "-E", "--no-color", "-b", "html"]
    command = [sys.executable, "-c", code, *options, str(docs), str(out)]
    return subprocess.run(command, cwd=out.parent, capture_output=True, text=True)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = build(DOCS, tmp_path / "site")
    assert (done.returncode, done.stderr) == (0, "")
    assert_complete(tmp_path)


def assert_complete(tmp_path: Path) -> None:
    """The built site has every page, what the pages of the reference are there for, and the search."""
    pages = {str(file.relative_to(tmp_path / "site")) for file in (tmp_path / "site").rglob("*.html")}
    assert {f"{name}.html" for names in NAV.values() for name in names} <= pages
    reference = "".join(file.read_text() for file in (tmp_path / "site" / "reference").glob("*.html"))
    for name in ("selective.SelectiveUpdate.step", "selective.MGUP", "selective.kernels.top_k"):
        assert f'id="{name}"' in reference
    assert_search(tmp_path / "site")


def assert_search(site: Path) -> None:
    """The site's own search answers each keyword with its page. It runs in node, which the tools for types bring."""
    if (command := node()) is None:
        assert not os.environ.get("CI"), "CI installs the extra `dev`, which brings node"
        return
    words = {word: place.partition("#")[0] for place, words in KEYWORDS.items() for word in words}
    answers = search(site, list(words), command)
    first = {word: (pages or [""])[0].partition("#")[0] for word, pages in answers.items()}
    assert {word: page for word, page in first.items() if page != words[word]} == {}
    for word, page in {
        "install": "guides/install",
        "muon": "guides/muon",
        "lora": "guides/fine-tuning",
        "slow": "performance",
    }.items():
        assert first[word] == page


def test_what_is_wrong_with_a_page_fails_the_build(tmp_path: Path) -> None:
    """... and there is nothing else to warn of: one build holds both, and a build without faults is slow."""
    shutil.copytree(DOCS, tmp_path / "docs")
    for name in ("scripts", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    with open(tmp_path / "docs" / "index.md", "a") as page:
        page.write("\n[one](no-such-page.md) [two](performance.md#no-such-anchor) [three](../examples/no_file.py)\n")
        page.write('\n<a href="no-such-file.html">four</a> <script src="https://example.org/x.js"></script>\n')
        page.write("\n% of a page is no comment\n")
    (tmp_path / "docs" / "forgotten.md").write_text("# Forgotten\n")
    done = build(tmp_path / "docs", tmp_path / "site")
    assert done.returncode != 0
    found = done.stderr.splitlines()
    assert "% of a page is no comment" in (tmp_path / "site" / "index.html").read_text()
    assert len(found) == 9, done.stderr  # the three links are found in the sources, and in the built page
    assert_complete(tmp_path)
    for part in (
        "no-such-page.md",
        "no-such-anchor",
        "no_filepy",
        "no-such-file.html leads nowhere",
        "fetched from another host: https://example.org/x.js",
        "forgotten.md: WARNING: document isn't included in any toctree",
    ):
        assert any(part in line for line in found), (part, done.stderr)


@pytest.mark.slow
def test_the_check_of_the_built_pages_alone_fails_the_build(tmp_path: Path) -> None:
    shutil.copytree(DOCS, tmp_path / "docs")
    for name in ("scripts", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    page = (DOCS / "index.md").read_text() + '\n<a href="no-such-file.html">four</a>\n'
    (tmp_path / "docs" / "index.md").write_text(page)
    done = build(tmp_path / "docs", tmp_path / "again")
    assert done.returncode != 0
    assert done.stderr.splitlines() == ["WARNING: index.html: no-such-file.html leads nowhere"]


def test_problems_of_built_pages_are_found(tmp_path: Path) -> None:
    assert problems(tmp_path) == [f"{tmp_path}: there is no page"]
    (tmp_path / "a.html").write_text('<h1 id="here">a</h1> <a href="b.html#there">b</a> <a href="#here">a</a>')
    (tmp_path / "b.html").write_text('<p id="there"></p> <img src="c.png" alt="c"> <a href="https://example.org">e</a>')
    (tmp_path / "c.png").write_bytes(b"")
    assert problems(tmp_path) == []
    (tmp_path / "a.html").write_text('<a href="b.html#here">b</a> <a href="#there"></a> <a href="d.html">d</a>')
    (tmp_path / "b.html").write_text('<img src="c.png"> <link rel="stylesheet" href="//example.org/x.css">')
    (tmp_path / "x.css").write_text("@font-face { src: url('https://example.org/font.woff2') }")
    assert problems(tmp_path) == [
        "a.html: b.html#here leads nowhere",
        "a.html: #there leads nowhere",
        "a.html: d.html leads nowhere",
        "b.html: a picture without alt text: c.png",
        "b.html: fetched from another host: //example.org/x.css",
        "x.css: fetches from another host",
    ]


def test_every_page_is_in_the_nav_once() -> None:
    listed = [name for names in NAV.values() for name in names]
    assert len(listed) == len(set(listed))
    there = {str(file.relative_to(DOCS).with_suffix("")) for file in DOCS.rglob("*.md")} - {"index"}
    assert set(listed) == there


def test_keywords_belong_to_a_page_once() -> None:
    words = [word for words in KEYWORDS.values() for word in words]
    assert len(words) == len(set(words))
    assert {place.partition("#")[0] for place in KEYWORDS} <= {name for names in NAV.values() for name in names}
    text = "# A\n\n```python\n# B\n```\n\n## Why is my step slow?\n\nc\n"
    with pytest.raises(ValueError, match="guides/faq#which-learning-rate: there is no such heading"):
        with_entries("guides/faq", text)


def test_pages_are_prepared() -> None:
    index = prepared(DOCS, "index", "# Home\n")
    assert all(f":caption: {part}" in index for part in NAV)
    assert prepared(DOCS, "x", "[a](../examples/a_b.py)") == "[a](guides/examples.md#a_bpy)"
    cards = prepared(DOCS, "index", "# A\n\n<!-- cards -->\n\n- **[b](c)**\n\n  d\n- e\n\nf\n")
    assert "::::{container} cards\n- **[b](c)**\n\n  d\n- e\n::::\n\nf\n" in cards
    output = prepared(DOCS, "x", "<!-- output -->\n```text\na\n```\n\nb\n")
    assert output == "::::{container} output\n```text\na\n```\n::::\n\nb\n"
    spaces = prepared(DOCS, "x", "2 ± 1\n%, `3 ± 1`\n\n````text\n``` 4 ± 1\n````\n\n5 ± 1\n")
    assert spaces == "2 ±\xa01\xa0%, `3 ± 1`\n\n````text\n``` 4 ± 1\n````\n\n5 ±\xa01\n"
    install = prepared(DOCS, "guides/install", (DOCS / "guides" / "install.md").read_text())
    assert install.startswith("# Install\n\n```{index} ! install, ! ")
    assert "## On an NVIDIA GPU\n\n```{index} ! triton, " in install
    assert prepared(DOCS, "guides/x", "[a](../../examples/a.py)") == "[a](../guides/examples.md#apy)"
    everything = prepared(DOCS, "reference/index", (DOCS / "reference" / "index.md").read_text())
    assert all(f"<{name}>" in everything for name in public_names() if name.startswith("selective.testing."))
    examples = prepared(DOCS, "guides/examples", (DOCS / "guides" / "examples.md").read_text())
    assert all(
        file.read_text() in examples for file in (ROOT / "examples").iterdir() if file.suffix in (".py", ".yaml")
    )
