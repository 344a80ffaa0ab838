"""Writes the tables of what a step costs, each from a measurement file, behind its mark `<!-- steps: FILE -->`.

    python scripts/step_tables.py            writes them into the pages, which `PAGES` names
    python scripts/step_tables.py --check    exits with 1 if a page has other tables than its files give

The table behind `<!-- steps: ratios -->` has the policies' ratios from several files.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from charts import CHARTS, DOCS, POLICIES, versus_fused

PAGES = ("performance.md", "reference/performance-tables.md")
STATISTICS = " + statistics"
RATIOS = {  # of the columns of the table of ratios: the chart whose file it takes, and its heading
    "step-h200": "H200, 1.1B, float32",
    "step-h200-bfloat16": "H200, 1.1B, bfloat16",
    "step-cpu": "2 CPU cores, 29M",
}
_MARKED = re.compile(r"(<!-- steps: (\S+) -->\n\n)(?:\*.+\*\n\n)?(?:\|.*\n)*")
Row = dict[str, Any]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  ", "| ")  # an empty cell is one space


def _head(cells: list[str]) -> list[str]:
    return [_line(cells), _line(["---"] * len(cells))]


def _rows(measurements: Path, name: str) -> tuple[Row, dict[str, Row]]:
    """The whole file, and its rows that were timed, by their names."""
    content = json.loads((measurements / name).read_text())
    rows = content["results"][0]["measurements"]
    return content, {row["name"]: row for row in rows if row["outcome"] == "timed"}


def where(content: Row) -> str:
    """A sentence on the machine, the versions and the parameters of a file."""
    run = content["results"][0]
    machine = content["gpu"] or f"{content['cpu']}, {content['threads']} threads"
    return (
        f"*{machine}, torch {content['torch']}, {content['date'][:10]}: {run['parameters'] / 1e6:,.1f}M {run['dtype']} "
        f"parameters in {run['tensors']} tensors.*"
    )


def table(content: Row, rows: dict[str, Row]) -> list[str]:
    """A line for each step. Columns that the file has no figures for are left out."""
    columns = {
        "ms": lambda row: f"{1e3 * row['median_seconds']:.2f}",
        "× fused": lambda row: f"{versus_fused(row):.2f}",
        "with statistics": lambda row: _with_statistics(rows, row),
        "launches": lambda row: str(sum(row["launches"].values())),
        "host ms": lambda row: f"{1e3 * row['host_seconds']:.1f}",
        "extra MiB": lambda row: f"{row['extra_bytes'] / 2**20:.0f}",
    }
    if content["gpu"] is None:
        del columns["launches"], columns["host ms"]
    names = [name for name in rows if not name.endswith(STATISTICS)]
    return [*_head(["step", *columns]), *(_line([n, *(cell(rows[n]) for cell in columns.values())]) for n in names)]


def _with_statistics(rows: dict[str, Row], row: Row) -> str:
    twin = rows.get(row["name"] + STATISTICS)
    return f"{versus_fused(twin):.2f}" if twin else ""


def ratios(measurements: Path) -> list[str]:
    """The policies' ratios, a column for each of `RATIOS`, with the digits of its chart."""
    found = {name: _rows(measurements, CHARTS[name].files[0])[1] for name in RATIOS}
    lines = _head(["policy", *RATIOS.values()])
    for policy, label in POLICIES.items():
        cells = [f"{versus_fused(f[policy]):.{CHARTS[n].digits}f} ×" if policy in f else "" for n, f in found.items()]
        lines.append(_line([f"`{label}`", *cells]))
    return lines


def filled(page: str, measurements: Path) -> str:
    """The page with its tables as the files give them."""

    def made(match: re.Match[str]) -> str:
        if match[2] == "ratios":
            lines = ratios(measurements)
        else:
            content, rows = _rows(measurements, match[2])
            lines = [where(content), "", *table(content, rows)]
        return match[1] + "\n".join(lines) + "\n"

    return _MARKED.sub(made, page)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the tables of what a step costs.")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    for name in PAGES:
        page = (DOCS / name).read_text()
        written = filled(page, DOCS / "measurements")
        if check and written != page:
            sys.exit(f"docs/{name} has other tables than its files: python scripts/step_tables.py writes them")
        (DOCS / name).write_text(written)


if __name__ == "__main__":
    main()
