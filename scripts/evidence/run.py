"""Makes the runs behind docs/evidence.md, or goes on with them.

    python scripts/evidence/run.py --out docs/measurements/evidence --stage 1 --seconds 550
    python scripts/evidence/run.py --out docs/measurements/evidence --table
    python scripts/evidence/run.py --out docs/measurements/evidence \\
        --page docs/evidence.md --picture docs/pictures/evidence.svg

The runs come in the order of `plan.py`. Each is written to a file of its own, and a run that has its file is not
repeated. So the work can be done in several sittings, each ended by `--seconds`. On a machine with several GPUs each
gets a process of its own, and further processes with the same `--out` may be started by hand: each takes the first run
that is neither done nor claimed. The texts have to be there: `python scripts/evidence/data.py python english`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":  # the folder `evidence` is imported from `scripts`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from evidence.claims import next_run
from evidence.page import all_tables, filled
from evidence.picture import draw
from evidence.plan import STAGES, wanted
from evidence.runs import Results, Run
from evidence.setups import optimizer_of
from evidence.tasks import TASKS
from evidence.training import Trainer
from selective.compare.train import write_atomically


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the results")
    add("--stage", type=int, action="append", choices=[*STAGES], help="only this stage; may be given several times")
    add("--seconds", type=float, default=math.inf, help="begin no run that would not end within so many seconds")
    add("--alone", action="store_true", help="note in the records that each run has its GPU to itself")
    add("--table", action="store_true", help="only print the tables")
    add("--page", type=Path, help="only write the tables into this page, behind their marks")
    add("--picture", type=Path, help="only draw the picture into this file, with the other files beside --out")
    add("--list", action="store_true", help="only print the runs that are left, as far as they are known")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    add("--one-process", action="store_true", help="use one GPU, even if there are several")
    add("--steps", type=int, default=600)
    add("--evaluate-every", type=int, default=50, help="steps from one evaluation to the next")
    add("--micro-batch", type=int, help="examples that are put through the model at once; the task's own without it")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    stages = options.stage or [*STAGES]
    if options.list or options.table or options.page or options.picture:
        show(options, stages)
        return 0
    gpus = torch.cuda.device_count() if options.device == "cuda" and not options.one_process else 1
    if gpus > 1:
        return _on_each_gpu(gpus, sys.argv[1:] if argv is None else argv)
    return work(options, stages)


def show(options: argparse.Namespace, stages: list[int]) -> None:
    """Print or write what there is, and train nothing."""
    results = Results.read(options.out)
    if options.list:
        left = [run.file for run in wanted(results, stages) if not (options.out / run.file).exists()]
        print("\n".join([*left, f"{len(left)} runs are left, and those that depend on them"]))
    if options.table:
        print(all_tables(results))
    if options.page:
        options.page.write_text(filled(options.page.read_text(), results))
    if options.picture:
        options.picture.write_text(draw(options.out.parent))


def work(options: argparse.Namespace, stages: list[int]) -> int:
    """Do runs until none is left, or until time is up."""
    begun = time.perf_counter()
    deadline = begun + options.seconds
    trainer: tuple[str, Trainer] | None = None  # of one task: the memory is for one model
    slowest = 0.0  # seconds of a step, with everything
    for run in next_run(options.out, deadline, lambda: wanted(Results.read(options.out), stages)):
        if time.perf_counter() + slowest * options.steps * run.part > deadline:
            print("out of time; the same command goes on from here")
            break
        if trainer is None or trainer[0] != run.task:
            trainer = (run.task, _trainer(run, options))
        since = time.perf_counter()
        record = trainer[1].go(run) | {"alone": options.alone}
        slowest = max(slowest, (time.perf_counter() - since) / record["steps"])
        write_atomically(options.out / run.file, (json.dumps(record) + "\n").encode())
        losses = record["validation"]["loss"]
        ended = "diverged" if record["diverged"] else f"{losses[-1]:.4f}"
        print(f"{run.file}: {ended}, {record['seconds']:.0f} s", flush=True)
    return 0


def _trainer(run: Run, options: argparse.Namespace) -> Trainer:
    task: Any = TASKS[run.task]()
    if options.micro_batch:
        task.micro_batch = options.micro_batch
    return Trainer(task, optimizer_of, options.steps, options.evaluate_every, options.device)


def _on_each_gpu(count: int, argv: list[str]) -> int:
    """The same command in a process for each GPU. Returns the first exit code that is not 0."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(gpu) for gpu in range(count)]
    command = [sys.executable, __file__, *argv, "--one-process"]
    processes = [subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": name}) for name in names]
    return next((code for code in [process.wait() for process in processes] if code), 0)


if __name__ == "__main__":
    raise SystemExit(main())
