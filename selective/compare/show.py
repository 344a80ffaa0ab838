"""Runs a comparison in the terminal, from its first line to the pictures and the last line in plain words."""

from __future__ import annotations

from typing import Any

from selective.compare import plots, table
from selective.compare.extras import require
from selective.compare.runner import Comparison
from selective.compare.words import in_plain_words

LOG_WIDTH = 140  # a log file has no width; rich would take 80


def check_extras() -> None:
    """Raise MissingExtra if a package is missing: before the training, not after it."""
    require("rich.console")
    require("matplotlib.figure")


def run_and_show(comparison: Comparison) -> bool:
    """Run what is not done, show bars, table and verdicts, and write the pictures. False if it was interrupted."""
    console = require("rich.console").Console()
    if not console.is_terminal:
        console.width = LOG_WIDTH
    _print(console, table.headline(comparison))
    with table.progress_bars(comparison, console) as handle:
        finished = comparison.run(handle)
    summary = comparison.summary
    table.show(summary, comparison, console)
    folder, records = comparison.folder, list(comparison.records.values())
    pictures = plots.write_plots(comparison.config, summary, records, folder, comparison.setup.task)
    written = [folder / "results.json", *pictures]
    _print(console, f"Written: {', '.join(str(path) for path in written)}", soft_wrap=True)
    for line in in_plain_words(summary):
        _print(console, line, soft_wrap=True)
    return finished


def _print(console: Any, text: str, soft_wrap: bool = False) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=soft_wrap)
