"""The order of the pages, and the parts that are put into them on their way to Sphinx.

The Markdown under docs/ is also read as it is, in an editor or on a forge. So it contains no syntax of Sphinx: the nav
is here, generated parts are comments, and links to files beside docs/ lead to a page that shows them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from . import keywords, notebook, reference

NAV = {
    "Start": ["guides/install", "guides/quick-start", "guides/worth-it", "guides/faq", "guides/coming-from"],
    "Guides": [
        "guides/pretraining",
        "guides/fine-tuning",
        "guides/muon",
        "guides/choose-a-policy",
        "guides/write-a-policy",
        "guides/rotate",
        "guides/decay",
        "guides/norm-control",
        "guides/stacks",
        "guides/distributed",
        "guides/sharded",
        "guides/checkpoints",
        "guides/watching",
        "guides/compare",
        "guides/doctor",
        "guides/examples",
    ],
    "Performance and evidence": ["performance", "evidence"],
    "How it works": [
        "how-it-works/step",
        "how-it-works/capture",
        "how-it-works/rotation",
        "how-it-works/kernels",
        "design",
    ],
    "Internals": [
        "internals/design-notes",
        "internals/gpu-kernels",
        "internals/cpu-top-k",
        "internals/rotation",
        "internals/performance",
        "internals/sharded",
    ],
    "Reference": [
        "reference/index",
        "reference/optimizer",
        "reference/explain",
        "reference/state",
        "reference/policies",
        "reference/rules",
        "reference/selections",
        "reference/preconditioners",
        "reference/watching",
        "reference/testing",
        "reference/bases",
        "reference/conformance",
        "reference/compare",
        "reference/bench",
        "reference/performance-tables",
        "reference/doctor",
        "reference/kernels",
    ],
}
INDEX = "<!-- reference-index -->"
SHOWN = "<!-- examples -->"
_EXAMPLE = re.compile(r"\]\((?:\.\./)+examples/([\w.]+)\)")
_CARDS = re.compile(r"^<!-- cards -->\n\n((?:(?:- |  ).*\n|\n(?=- |  ))+)", re.MULTILINE)
_OUTPUT = re.compile(r"^<!-- (?:output|printed) -->\n(```text\n.*?^```\n)", re.MULTILINE | re.DOTALL)
_APART = re.compile(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)|(?<=±)\s(?=\d)|(?<=\d)\s(?=%)", re.DOTALL)
_LANGUAGES = {".py": "python", ".yaml": "yaml"}


def prepared(docs: Path, name: str, text: str) -> str:
    """A page's text in the form that Sphinx gets."""
    text = reference.expand(text)
    text = _EXAMPLE.sub(lambda found: f"]({'../' * name.count('/')}guides/examples.md#{_slug(found[1])})", text)
    text = _CARDS.sub(_in_box("cards"), text)
    text = keywords.with_entries(name, text)
    if name == "index":
        text += "\n" + "\n".join(_toctree(part, pages) for part, pages in NAV.items())
    if INDEX in text:
        text = text.replace(INDEX, _index(docs))
    if SHOWN in text:
        text = text.replace(SHOWN, _examples(docs.parent / "examples"))
    return _OUTPUT.sub(_in_box("output"), _APART.sub(_together, text))


def _in_box(kind: str) -> Callable[[re.Match[str]], str]:
    """Puts what a comment marks into a box, which site.css lays out: cards; output, whose long lines are wrapped."""
    return lambda found: f"::::{{container}} {kind}\n{found[1]}::::\n"


def _together(found: re.Match[str]) -> str:
    """A space that no line may end at, between a number and its "±" or "%". Code stays as it is."""
    return found[0] if found[1] else "\N{NO-BREAK SPACE}"


def _toctree(part: str, pages: list[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {part}", "", *pages, "```", ""])


def _index(docs: Path) -> str:
    """A list of all names that have an entry, by page."""
    parts = []
    for page in NAV["Reference"]:
        text = (docs / f"{page}.md").read_text()
        if names := reference.names_in(text):
            title = text.removeprefix("# ").partition("\n")[0]
            parts.append(f"## {title}\n\n{reference.index(names)}")
    return "\n\n".join(parts)


def _examples(folder: Path) -> str:
    files = sorted(file for file in folder.iterdir() if file.suffix in (*_LANGUAGES, ".ipynb"))
    return "\n\n".join(f"## {file.name}\n\n{_shown(file)}" for file in files)


def _shown(file: Path) -> str:
    """A file as Markdown: a program in a fence, a notebook as text with fences."""
    if file.suffix == ".ipynb":
        return notebook.as_markdown(notebook.read(file))
    return f"````{_LANGUAGES[file.suffix]}\n{file.read_text()}````"


def _slug(file: str) -> str:
    """The anchor of a heading that is a file's name."""
    return file.replace(".", "").lower()
