"""Packages of other people: those that are missing here, and warnings that they raise themselves."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Beginnings of messages. `python -W` compares them literally.
THEIR_WARNINGS = (
    "`isinstance(treespec, LeafSpec)`",
    "The 'train_dataloader' does not have many workers",
    "Checkpoint directory",  # exists and is not empty: the directory of the run that is resumed
    # Until here Lightning's. Of torchao 0.15, from which transformers imports, and of DCP in torch 2.9 on a CPU:
    "Importing",
    "TypedStorage is deprecated",
)


def missing(names: Iterable[str]) -> list[str]:
    """The packages that can't be imported, because they are not installed or shadowed.

    transformers takes our folder `kernels/` for the package of that name where the repository is on `sys.path`.
    """
    shadowed = {"transformers"} if str(ROOT) in sys.path else set()
    return [name for name in names if name in shadowed or importlib.util.find_spec(name) is None]
