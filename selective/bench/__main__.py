"""`python -m selective.bench`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from selective.bench.contenders import standard_contenders
from selective.bench.measure import run
from selective.bench.report import as_json, table
from selective.bench.shapes import SHAPES


def main(argv: Sequence[str] | None = None) -> int:
    """Time, print a table, and on request write JSON. 1 where a contender was refused a time."""
    parser = argparse.ArgumentParser(prog="selective bench", description="What an optimizer's step costs on the CPU.")
    parser.add_argument("--shapes", choices=list(SHAPES), default="transformer-30m")
    parser.add_argument("--only", metavar="TEXT", action="append", help="only what has TEXT in its name, and torch")
    parser.add_argument("--rounds", type=_positive, default=7, help="timed steps of each (default: 7)")
    parser.add_argument("--threads", type=_positive, help="threads of torch; default: its own choice")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write everything there")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    contenders = standard_contenders()
    if options.only:
        wanted = [*options.only, "torch foreach", "torch fused"]
        for text in options.only:
            if not any(text in c.name for c in contenders):
                parser.error(f"--only {text!r}: no name has it; there are {', '.join(c.name for c in contenders)}")
        contenders = [c for c in contenders if any(text in c.name for text in wanted)]
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: the folder {options.json.absolute().parent} is not there; make it first")
    measured = run(options.shapes, contenders, rounds=options.rounds, tell=_tell)
    print(f"{options.shapes}, float32, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(table(measured))
    if options.json:
        options.json.write_text(json.dumps(as_json(measured, options.shapes), indent=1))
    return int(any(m.refused for m in measured))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 1 on is needed")
    return int(text)


def _tell(text: str) -> None:
    print(text, file=sys.stderr)  # not among the results


if __name__ == "__main__":
    sys.exit(main())
