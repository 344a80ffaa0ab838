"""Makes the runs behind docs/evidence.md, or goes on with them.

    python scripts/evidence/run.py --out docs/measurements/evidence --stage 1 --seconds 550
    python scripts/evidence/run.py --out docs/measurements/evidence --list
    python scripts/evidence/run.py --out docs/measurements/evidence --dry-run
    python scripts/evidence/run.py --out docs/measurements/evidence --table
    python scripts/evidence/run.py --out docs/measurements/evidence \\
        --page docs/evidence.md --picture docs/pictures/evidence.svg

The runs come in the order of `plan.py`. Each is written to a file of its own, and a run that has its file is not
repeated. So the work can be done in several sittings, each ended by `--seconds`. On a machine with several GPUs each
gets a process of its own, and further processes with the same `--out` may be started by hand: each takes the first run
that is neither done nor claimed. `--workers` starts several for each GPU: a small model leaves most of it idle. Times
count only with one. The data has to be there: `data.py python english`, `foldoc.py`, `pictures.py`; `--dry-run` says
what is missing.
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
from evidence.dry_run import dry_run, rows_of, without_data
from evidence.forecast import Seconds, outlook
from evidence.page import all_tables, filled
from evidence.picture import draw
from evidence.plan import STAGES, wanted
from evidence.runs import Results, Run
from evidence.setups import optimizer_of
from evidence.tasks import TASKS
from evidence.training import Trainer
from selective.compare.train import write_atomically

COMPILING = 40.0  # seconds until a model is read, compiled and evaluated for the first time, on an H200


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = made.add_argument
    add("--out", type=Path, required=True, help="folder of the results")
    add("--stage", type=int, action="append", choices=[*STAGES], help="only this stage; may be given several times")
    add("--seconds", type=float, default=math.inf, help="begin no run that would not end within so many seconds")
    add("--alone", action="store_true", help="note in the records that each run has its GPU to itself")
    add("--table", action="store_true", help="only print the tables")
    add("--page", type=Path, help="only write the tables into this page, behind their marks")
    add("--picture", type=Path, help="only draw the picture into this file, with the other files beside --out")
    add("--list", action="store_true", help="only print the runs that are left, and how long each stage takes")
    add("--dry-run", action="store_true", help="only take two steps of each row at toy size, and look for the data")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    add("--one-process", action="store_true", help="use one GPU, even if there are several")
    add("--workers", type=int, default=1, help="processes on each GPU; times don't count if there are several")
    add("--steps", type=int, default=600)
    add("--evaluate-every", type=int, default=50, help="steps from one evaluation to the next")
    add("--micro-batch", type=int, help="examples that are put through the model at once; the task's own without it")
    return made


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if options.alone and options.workers > 1:
        parser().error("--alone says that a run has its GPU to itself, and --workers starts several runs on it")
    options.out.mkdir(parents=True, exist_ok=True)
    stages = options.stage or [*STAGES]
    if options.dry_run:
        return try_out(options, stages)
    if options.list or options.table or options.page or options.picture:
        show(options, stages)
        return 0
    gpus = torch.cuda.device_count() if options.device == "cuda" and not options.one_process else 1
    if gpus * options.workers > 1:
        return _in_processes(gpus, options, sys.argv[1:] if argv is None else argv)
    return work(options, stages)


def show(options: argparse.Namespace, stages: list[int]) -> None:
    """Print or write what there is, and train nothing."""
    results = Results.read(options.out)
    if options.list:
        left = [run.file for run in wanted(results, stages) if not (options.out / run.file).exists()]
        print("\n".join([*left, f"{len(left)} runs are left, and those that depend on them"]))
        print(outlook(results, stages, options.steps))
    if options.table:
        print(all_tables(results))
    if options.page:
        options.page.write_text(filled(options.page.read_text(), results))
    if options.picture:
        options.picture.write_text(draw(options.out.parent))


def try_out(options: argparse.Namespace, stages: list[int]) -> int:
    """Take two steps of each row at toy size, and look for the data. Returns 1 if something fails."""
    rows = rows_of(Results.read(options.out), stages)
    failed = [*without_data(run.task for run in rows), *dry_run(rows, options.device)]
    print("\n".join([*failed, f"{len(rows)} rows, {len(failed)} failures"]))
    return 1 if failed else 0


def expected(run: Run, results: Results, steps: int, slowest: float, compiled: bool = True) -> float:
    """The seconds of a run: those of its setup, or else of the slowest step of this sitting and of other setups.

    With `compiled` False, its model has to be compiled before.
    """
    seconds = Seconds(results)
    known = seconds.of(run, steps) or 0.0
    return (known if seconds.knows(run) else max(known, slowest * steps * run.part)) + (0 if compiled else COMPILING)


def work(options: argparse.Namespace, stages: list[int]) -> int:
    """Do runs until none is left, or until time is up."""
    print(outlook(Results.read(options.out), stages, options.steps), flush=True)
    begun = time.perf_counter()
    deadline = begun + options.seconds
    trainer: tuple[str, Trainer] | None = None  # of one task: the memory is for one model
    slowest = 0.0  # seconds of a step, with everything
    for run in next_run(options.out, deadline, lambda: wanted(Results.read(options.out), stages)):
        compiled = options.device == "cpu" or (trainer is not None and trainer[0] == run.task)
        if time.perf_counter() + expected(run, Results.read(options.out), options.steps, slowest, compiled) > deadline:
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


def _in_processes(gpus: int, options: argparse.Namespace, argv: list[str]) -> int:
    """The same command in processes of its own, on each GPU. Returns the first exit code that is not 0."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names: list[str | None] = [str(gpu) for gpu in range(gpus)]
    if options.device == "cpu" or options.one_process:
        names = [visible]
    elif visible:
        names = [*visible.split(",")]
    command = [sys.executable, __file__, *argv, "--one-process", "--workers", "1"]
    processes = [
        subprocess.Popen(command, env=os.environ | ({} if name is None else {"CUDA_VISIBLE_DEVICES": name}))
        for name in names
        for _ in range(options.workers)
    ]
    return next((code for code in [process.wait() for process in processes] if code), 0)


if __name__ == "__main__":
    raise SystemExit(main())
