"""Runs a notebook's code cells without Jupyter, and keeps what they print in the file.

    python scripts/documentation/notebook.py examples/tour.ipynb            # does it print what the file says?
    python scripts/documentation/notebook.py examples/tour.ipynb --write    # write what it prints into the file

A cell may print what is the same on every machine, and nothing else may come out of it: no value of a last line, no
picture. The cells run in one namespace, in a folder that is thrown away.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

Notebook = dict[str, Any]


def read(path: Path) -> Notebook:
    """The notebook, of nbformat 4."""
    notebook = json.loads(path.read_text())
    if notebook["nbformat"] != 4:
        raise ValueError(f"{path}: nbformat is {notebook['nbformat']}, must be 4")
    return notebook


def printed(notebook: Notebook, where: str) -> list[str]:
    """Execute the code cells, in the current folder, and return what each prints. `where` names the file in errors."""
    page, before = types.ModuleType("__main__"), sys.modules["__main__"]
    texts = []
    sys.modules["__main__"] = page  # what the cells define can be pickled, as in a script
    try:
        for number, cell in enumerate(code_cells(notebook), 1):
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("".join(cell["source"]), f"{where}, code cell {number}", "exec"), vars(page))
            texts.append(out.getvalue())
    finally:
        sys.modules["__main__"] = before
    return texts


def stored(notebook: Notebook) -> list[str]:
    """Return the output of each code cell, as the file has it."""
    return ["".join(line for output in cell["outputs"] for line in output["text"]) for cell in code_cells(notebook)]


def with_outputs(notebook: Notebook, texts: list[str]) -> Notebook:
    """The notebook with these outputs, and with its cells counted."""
    cells, places = [dict(cell) for cell in notebook["cells"]], iter(enumerate(texts, 1))
    for cell in cells:
        if cell["cell_type"] == "code":
            number, text = next(places)
            stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
            cell |= {"execution_count": number, "outputs": [stream] if text else []}
    return {**notebook, "cells": cells}


def code_cells(notebook: Notebook) -> list[dict[str, Any]]:
    """The cells that are executed."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def as_markdown(notebook: Notebook) -> str:
    """The notebook as a part of a page: its headings are two levels lower."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append("\n".join(f"##{line}" if line.startswith("#") else line for line in text.splitlines()))
            continue
        parts.append(f"```python\n{text}\n```")
        output = "".join(line for each in cell["outputs"] for line in each["text"])
        parts += [f"<!-- output -->\n```text\n{output.rstrip()}\n```"] if output else []
    return "\n\n".join(parts)


def main() -> int:
    """Run the command line. Returns the exit code: 1 if the file does not say what is printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--write", action="store_true", help="write what is printed into the file")
    options = parser.parse_args()
    path = options.notebook.resolve()
    notebook, before = read(path), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            texts = printed(notebook, path.name)
        finally:
            os.chdir(before)
    if options.write:
        path.write_text(json.dumps(with_outputs(notebook, texts), indent=1, ensure_ascii=False) + "\n")
        return 0
    for number, (text, expected) in enumerate(zip(texts, stored(notebook), strict=True), 1):
        if text != expected:
            print(f"{path.name}: code cell {number} prints\n{text}and the file says\n{expected}")
    return int(texts != stored(notebook))


if __name__ == "__main__":
    sys.exit(main())
