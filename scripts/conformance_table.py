"""Writes the tables of docs/reference/conformance.md: the checks that each wrapper passes, and the checks themselves.

    pip install --no-deps pytorch_optimizer magma-optimizer schedulefree
    python scripts/conformance_table.py --run      # run the suite on every wrapper that is installed; a few minutes
    python scripts/conformance_table.py            # only write the page anew from the results of the last run

Each wrapper runs in a process of its own, by the command that everybody uses: `pytest -p selective.testing --wrapper
...`, in an empty folder. The results are kept in docs/measurements/conformance.json.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference" / "conformance.md"
RESULTS = ROOT / "docs" / "measurements" / "conformance.json"
SIGNS = {"passed": "yes", "failed": "**no**", "not applicable": "–", "skipped": "?"}
ADAMW, SGD = "torch.optim:AdamW(lr=0.01)", "torch.optim:SGD(lr=0.1)"


@dataclass(frozen=True)
class Column:
    """A column of the table: a wrapper, as the command line names it, and its distribution."""

    title: str
    wrapper: str
    distribution: str
    base: str = ADAMW


def nothing(base: Any) -> Any:
    """The wrapper that wraps nothing."""
    return base


def schedule_free(base: Any) -> Any:
    """schedulefree's wrapper in training mode, as its documentation says."""
    wrapper = importlib.import_module("schedulefree").ScheduleFreeWrapper(base)
    wrapper.train()
    return wrapper


def chained(base: Any) -> Any:
    """A chain whose only member is `SelectiveUpdate` over the base. Chains of several are held to it by the tests."""
    selective = importlib.import_module("selective")
    return selective.ChainedOptimizer([selective.SelectiveUpdate(base, policy="MGUP")])


COLUMNS = (
    Column("no wrapper", "conformance_table:nothing", "torch"),
    Column("SelectiveUpdate, MGUP", "selective:SelectiveUpdate(policy='MGUP')", "selective-update"),
    Column("SelectiveUpdate, Magma", "selective:SelectiveUpdate(policy='Magma')", "selective-update"),
    Column("ChainedOptimizer, MGUP", "conformance_table:chained", "selective-update"),
    Column("pytorch_optimizer Lookahead", "pytorch_optimizer:Lookahead", "pytorch_optimizer"),
    Column("pytorch_optimizer Magma", "pytorch_optimizer:Magma", "pytorch_optimizer"),
    Column("magma-optimizer Magma", "magma:Magma", "magma-optimizer"),
    Column("schedulefree wrapper", "conformance_table:schedule_free", "schedulefree", SGD),
)


def run(column: Column) -> dict[str, Any]:
    """Run the suite on a wrapper. Returns the content of `--wrapper-json`. Exits if the suite could not start."""
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(Path(__file__).parent)])
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "selective.testing"]
        command += ["--wrapper", column.wrapper, "--wrapper-base", column.base, "--wrapper-json", "found.json"]
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        return json.loads((Path(folder) / "found.json").read_text())


def run_all() -> dict[str, Any]:
    """Run the suite on all wrapper columns. Returns the results with versions and date."""
    columns: list[dict[str, Any]] = []
    for column in COLUMNS:
        try:
            number = version(column.distribution)
        except PackageNotFoundError:
            sys.exit(f"{column.distribution} is not installed; the docstring of this script has the command")
        print(f"{column.distribution} {number}: {column.wrapper}", flush=True)
        described = {"title": column.title, "distribution": column.distribution, "version": number, "base": column.base}
        columns.append({**described, **run(column)})
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    stacks = {name: version(name) for name in ("accelerate", "lightning", "transformers")}
    return {"date": today, "stacks": stacks, "columns": columns}


def table(results: dict[str, Any]) -> str:
    """The table of checks × wrappers, and a list of the columns' wrappers."""
    columns = results["columns"]
    cells = [{outcome["check"]: _cell(outcome) for outcome in column["outcomes"]} for column in columns]
    lines = ["| check | row | " + " | ".join(column["title"] for column in columns) + " |"]
    lines.append("| --- | --- |" + " --- |" * len(columns))
    for outcome in columns[0]["outcomes"]:
        lines.append(
            f"| `{outcome['check']}` | {outcome['row']} | " + " | ".join(c[outcome["check"]] for c in cells) + " |"
        )
    totals = [str(sum(outcome["verdict"] == "failed" for outcome in column["outcomes"])) for column in columns]
    lines += ["| **no**, in all | | " + " | ".join(totals) + " |", ""]
    for column in columns:
        named = f'`--wrapper "{column["wrapper"]}"` over `{column["base"].partition(":")[2]}`'
        lines.append(f"- {column['title']}: {column['distribution']} {_public(column['version'])}, {named}")
    stacks = ", ".join(f"{name} {number}" for name, number in results["stacks"].items())
    with_ = f"torch {_public(columns[0]['torch'])}, Python {columns[0]['python']}, {stacks}"
    return "\n".join([*lines, "", f"{results['date']}, on a CPU, with {with_}."])


def _cell(outcome: dict[str, Any]) -> str:
    measured = re.search(r"keeps (-?[\d.]+) copies", outcome["message"])
    return SIGNS[outcome["verdict"]] + (f" ({measured[1]} copies)" if measured else "")


def _public(number: str) -> str:
    """A version without the name of a build."""
    return number.partition("+")[0]


def findings(results: dict[str, Any]) -> str:
    """The failures of each wrapper, in the suite's words."""
    lines = []
    for column in results["columns"]:
        failed = [outcome for outcome in column["outcomes"] if outcome["verdict"] == "failed"]
        if failed:
            lines += [f"**{column['title']}**", ""]
            lines += [f"- row {outcome['row']}, `{outcome['check']}`: {outcome['message']}" for outcome in failed] + [
                ""
            ]
    return "\n".join(lines).rstrip()


def checks() -> str:
    """The table of the checks, with the harm that a failure does."""
    from selective.testing import all_checks

    lines = ["| check | row | what is checked | otherwise |", "| --- | --- | --- | --- |"]
    for check in all_checks():
        doc = " ".join(check.doc.split("\n\n")[0].split())
        lines.append(f"| `{check.name}` | {check.row} | {doc} | {check.why} |")
    return "\n".join(lines)


def page(text: str, results: dict[str, Any]) -> str:
    """The page's text, with the parts between its marks made anew."""
    for name, part in (("table", table(results)), ("findings", findings(results)), ("checks", checks())):
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- end of {name} -->)"
        text, count = re.subn(pattern, lambda m, part=part: f"{m[1]}\n{part}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            sys.exit(f"{PAGE}: found {count} marks of {name}, expected one")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--run", action="store_true", help="run the suite on every wrapper first")
    if parser.parse_args().run:
        RESULTS.write_text(json.dumps(run_all(), indent=1) + "\n")
    PAGE.write_text(page(PAGE.read_text(), json.loads(RESULTS.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
