"""Checks the English of pages, docstrings, comments and messages. A part of `make lint`.

    python scripts/style.py [FILE ...]      without files: all Markdown and Python of the repository

Without files, only the openings of docstrings are checked in the tests. Prints a line for each finding and exits with
1 if there is one. Needs proselint (the extra `dev`). The words are in scripts/documentation/vocabulary.txt. Spelling is
codespell's part.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from documentation.openings import openings
from documentation.style import findings, vocabulary

ROOT = Path(__file__).resolve().parents[1]
NOT_OURS_TO_EDIT = ("CHANGELOG.md", "LICENSE", "tests/", "docs/measurements/")  # of the log: what was said stays


def files(*patterns: str, without: tuple[str, ...] = ()) -> list[Path]:
    """The files that git knows, so that no environment or build folder is among them."""
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    named = [name for name in listed.stdout.splitlines() if not name.startswith(without)]
    return [ROOT / name for name in named if not (ROOT / name).is_symlink() and (ROOT / name).exists()]


def main() -> None:
    chosen = [Path(name) for name in sys.argv[1:]]
    modules = [file for file in chosen if file.suffix == ".py"] if chosen else files("*.py")
    lines = list(findings(chosen or files("*.md", "*.py", without=NOT_OURS_TO_EDIT), vocabulary()))
    lines += openings(modules)
    print("\n".join(line.removeprefix(f"{ROOT}/") for line in lines), end="\n" if lines else "")
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
