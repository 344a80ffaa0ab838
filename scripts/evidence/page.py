"""Puts the tables into a page: each behind its mark, such as `<!-- evidence: python-34m AdamW -->`.

A table on the page has the rows that were run. The table behind `<!-- evidence: not run -->` names all the others.
"""

from __future__ import annotations

import re

from evidence.runs import Results
from evidence.table import NOT_RUN, TABLES

_MARKED = re.compile(r"(<!-- evidence: ([^>]+?) -->\n\n)((?:\|.*\n)*)")
_MISSING = f"| {NOT_RUN} |"  # the cell of a row without runs


def filled(page: str, results: Results) -> str:
    """The page with its tables as the records give them. Raises KeyError for a mark that no table has."""

    def made(match: re.Match[str]) -> str:
        lines = not_run_table(results) if match[2] == NOT_RUN else rows_with_runs(match[2], results)
        return match[1] + "\n".join(lines) + "\n" + ("" if match[3] else "\n")  # an empty line ends a table

    return _MARKED.sub(made, page)


def marks(page: str) -> list[str]:
    """The names of the tables that the page asks for."""
    return [match[2] for match in _MARKED.finditer(page)]


def rows_with_runs(name: str, results: Results) -> list[str]:
    """A table without the rows that were not run."""
    return [line for line in TABLES[name](results) if _MISSING not in line]


def missing(name: str, results: Results) -> list[str]:
    """The labels of the rows of a table that were not run."""
    return [line.split(" | ")[0].removeprefix("| ") for line in TABLES[name](results) if _MISSING in line]


def not_run_table(results: Results) -> list[str]:
    """The rows of all tables that were not run, in a line for each table that has some."""
    lines = ["| table | setups |", "| --- | --- |"]
    for name in TABLES:
        if labels := missing(name, results):
            lines.append(f"| {name} | {'; '.join(labels)} |")
    return lines


def all_tables(results: Results) -> str:
    """All tables with their names, to be printed."""
    return "\n\n".join("\n".join([name, "", *make(results)]) for name, make in TABLES.items())
