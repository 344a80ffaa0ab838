"""Measures the gain of rotations and selection on a model that is worth a GPU, for "What it gains" in the docs.

    python scripts/gain.py --out docs/measurements/gain --seconds 550
    python scripts/gain.py --out docs/measurements/gain --table

It trains a LLaMA-style model (by default 33.6M parameters) on the source of the installed Python packages, cut into
tokens by a byte-level BPE of 8,192 tokens that is trained here. A run has 600 steps of 65,536 tokens, a cosine schedule
with warm-up, clipping, and bfloat16 autocast. Every setup is swept over learning rates.

The runs come in the order of `plan`. Each is written to a file of its own, and a run that has its file is not repeated.
So the work can be done in several sittings, each ended by `--seconds`, and by several processes with the same `--out`
on one machine: each takes the first run that is neither done nor claimed. It needs the packages tokenizers and, for
one rival, pytorch_optimizer.
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
import time
from pathlib import Path

import torch
from evidence import runs
from evidence.claims import next_run
from evidence.training import Trainer
from gain_plan import Run, carries, decays, plan, results, times
from gain_table import table
from gain_train import trainer_of

from selective.compare.train import write_atomically


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the results")
    add("--table", action="store_true", help="only print the tables of the runs that are done")
    add("--carries", action="store_true", help="make the runs that compare ways to carry second moments")
    add("--decays", action="store_true", help="make the runs with selective decay and its random control")
    add("--times", action="store_true", help="make the runs whose times are compared, one at a time on a free device")
    add("--seconds", type=float, default=math.inf, help="begin no run that would not end within so many seconds")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    add("--fused", action="store_true", help="queries, keys and values in one matrix, gate and value in another")
    add("--text", type=Path, default=Path(sysconfig.get_path("purelib")), help="folder with Python sources")
    add("--characters", type=int, default=200_000_000, help="number of characters of the text")
    for name, value in {"steps": 600, "batch": 128, "micro-batch": 32, "context": 512, "layers": 8, "width": 512,
                        "heads": 8, "vocabulary": 8192, "evaluate-every": 25}.items():  # fmt: skip
        add(f"--{name}", type=int, default=value)
    options = parser.parse_args(argv)
    begun = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    trainer: Trainer | None = None
    longest = 0.0
    only = carries if options.carries else decays if options.decays else times if options.times else None

    def wanted() -> list[Run]:
        return list(plan(lambda: results(options.out)) if only is None else only())

    for run in () if options.table else next_run(options.out, begun + options.seconds, wanted):
        if time.perf_counter() - begun + longest > options.seconds:
            print("out of time; the same command goes on from here")
            break
        trainer = trainer or trainer_of(options)
        record = trainer.go(runs.Run("gain", run.setup, run.lr, run.seed, part=run.part))
        longest = max(longest, record["seconds"])
        write_atomically(options.out / run.file, json.dumps(record).encode())
        ended = "diverged" if record["diverged"] else f"{record['validation']['loss'][-1]:.4f}"
        print(f"{run.file}: {ended}, {record['seconds']:.0f} s", flush=True)
    print(table(options.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
