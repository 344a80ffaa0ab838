"""Packages of other people: those that are missing here, and warnings that they raise themselves."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

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
    """The packages that are not installed."""
    return [name for name in names if importlib.util.find_spec(name) is None]
