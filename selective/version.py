"""The version of the library."""

from __future__ import annotations

__version__ = "0.1.0"  # the only place that names it: pyproject.toml reads it from here
