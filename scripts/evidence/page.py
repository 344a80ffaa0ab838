"""Puts the tables into a page: each behind its mark, such as `<!-- evidence: python-34m AdamW -->`."""

from __future__ import annotations

import re

from evidence.runs import Results
from evidence.table import TABLES

_MARKED = re.compile(r"(<!-- evidence: ([^>]+?) -->\n\n)((?:\|.*\n)*)")


def filled(page: str, results: Results) -> str:
    """The page with its tables as the records give them. Raises KeyError for a mark that no table has."""

    def made(match: re.Match[str]) -> str:
        table = "\n".join(TABLES[match[2]](results)) + "\n"
        return match[1] + table + ("" if match[3] else "\n")  # an empty line ends a table

    return _MARKED.sub(made, page)


def marks(page: str) -> list[str]:
    """The names of the tables that the page asks for."""
    return [match[2] for match in _MARKED.finditer(page)]


def all_tables(results: Results) -> str:
    """All tables with their names, to be printed."""
    return "\n\n".join("\n".join([name, "", *make(results)]) for name, make in TABLES.items())
