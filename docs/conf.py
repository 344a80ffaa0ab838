"""The settings of the site that `make docs` builds. Dead links, and pages outside of the nav, are errors there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "scripts"))

from documentation import check, pages  # noqa: E402
from sphinx.util.logging import getLogger  # noqa: E402

from selective import __version__  # noqa: E402

project = "selective"
copyright = "The selective authors, Apache-2.0"
release = version = __version__

extensions = ["myst_parser", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence", "fieldlist"]
myst_disable_syntax = ["myst_line_comment"]  # a line that begins with "% of" is text
myst_heading_anchors = 4  # the anchors that GitHub makes
smartquotes_action = "D"  # dashes only: "fused" in the text is what is written in Python
exclude_patterns = ["measurements", "pictures"]

html_theme = "furo"  # system fonts, nothing from other hosts; the search is a script over an index of its own
html_title = f"selective {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["wide.js"]  # says above a table that it scrolls, and indents lines that are wrapped
copybutton_selector = "div.highlight-python pre, div.highlight-bash pre, div.highlight-yaml pre"  # no output, no diff
html_copy_source = False
html_show_sourcelink = False
maximum_signature_line_length = 80  # a longer one has a line for each parameter
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1f5f8b", "color-brand-content": "#1f5f8b"},
    "dark_css_variables": {"color-brand-primary": "#7fc1ec", "color-brand-content": "#7fc1ec"},
}

# `make docs-links` asks for each of these; no other command needs a network.
linkcheck_timeout = 20
linkcheck_workers = 4
linkcheck_anchors = False


def _read(app: Any, name: str, source: list[str]) -> None:
    source[0] = pages.prepared(HERE, name, source[0])


def _finished(app: Any, failure: Exception | None) -> None:
    if failure is None and app.builder.format == "html":
        for line in check.problems(Path(app.outdir)):
            getLogger(__name__).warning(line)


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", _read)
    app.connect("build-finished", _finished)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
