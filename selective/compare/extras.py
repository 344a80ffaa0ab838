"""Imports packages that only the comparison needs, on first use."""

from __future__ import annotations

import importlib
from typing import Any

NEEDED_FOR = {
    "rich": ("rich", "the progress bars and the table"),
    "yaml": ("PyYAML", "configuration files in YAML (JSON works without it)"),
    "matplotlib": ("matplotlib", "the loss curves and the heatmap"),
}


class MissingExtra(ImportError):
    """Raised if a package of the extra `compare` is not installed. The message says how to install it."""


def require(module: str) -> Any:
    """Import `module`. Raises MissingExtra, which says what the package is for and how to install it."""
    top = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != top:
            raise  # the package is there, and one of its own imports is broken: do not hide that
        package, purpose = NEEDED_FOR[top]
        raise MissingExtra(
            f"{package} is not installed; `selective compare` needs it for {purpose}. "
            'Install it with: pip install "selective-update[compare]"',
            name=top,
        ) from error
