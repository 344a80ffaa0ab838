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
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="threads of torch; default: its own choice")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write everything there")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    contenders = standard_contenders()
    if options.only:
        wanted = [*options.only, "torch foreach", "torch fused"]
        contenders = [c for c in contenders if any(text in c.name for text in wanted)]
    measured = run(options.shapes, contenders, rounds=options.rounds)
    print(f"{options.shapes}, float32, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(table(measured))
    if options.json:
        options.json.write_text(json.dumps(as_json(measured, options.shapes), indent=1))
    return int(any(m.refused for m in measured))


if __name__ == "__main__":
    sys.exit(main())
