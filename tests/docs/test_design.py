"""The tree of docs/design.md has the folders that there are."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DESIGN = (ROOT / "docs" / "design.md").read_text()
IN_A_LINE_ABOVE = {
    "kernels/gpu/device/top_k",
    "selective/bench/training",
    "docs/_static",
}  # with the folder around them


def folders_of_the_tree(page: str) -> set[str]:
    """The folders in the page's tree, by their paths. A line is indented by two spaces for each folder above it."""
    tree = page.partition("## The tree")[2].partition("```text\n")[2].partition("```")[0]
    found, above = set(), list[str]()
    for line in tree.splitlines():
        if names := re.match(r"( *)((?:\w[\w-]*/(?:, )?)+)", line):
            del above[len(names[1]) // 2 :]
            folders = re.findall(r"[\w-]+", names[2])
            found |= {"/".join([*above, name]) for name in folders}
            above.append(folders[0])
    return found


def folders_there() -> set[str]:
    code = {file.parent for top in ("selective", "kernels") for file in (ROOT / top).rglob("*.py")}
    pages = {folder for folder in (ROOT / "docs").iterdir() if folder.is_dir()}
    names = {str(folder.relative_to(ROOT)) for folder in {*code, *pages, ROOT / "docs"}}
    return {name for name in names if not name.startswith("selective/kernels") and "__pycache__" not in name}


def test_the_tree_has_every_folder() -> None:
    assert folders_of_the_tree(DESIGN) == folders_there() - IN_A_LINE_ABOVE


def test_a_folder_that_is_missing_or_gone_is_noticed() -> None:
    assert folders_of_the_tree(DESIGN.replace("  rotation/ ", "  turning/ ")) ^ folders_of_the_tree(DESIGN) == {
        "selective/rotation",
        "selective/turning",
    }
    assert IN_A_LINE_ABOVE <= folders_there()
