"""The command line of `python -m selective.bench` and `selective bench`."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch

from selective.bench.contenders import Contender, control_contenders, standard_contenders
from selective.bench.environment import environment
from selective.bench.first_step import first_step_table, first_steps_as_json, measure_first_steps
from selective.bench.limit import Limit, report_interruption
from selective.bench.measure import Result, run
from selective.bench.peers import peer_contenders
from selective.bench.report import as_json, heading, table
from selective.bench.rotations import measure_rotations
from selective.bench.rotations_table import rotation_table
from selective.bench.shapes import SHAPES
from selective.bench.training.command import add_options, training
from selective.bench.training.rows import Row
from selective.preconditioner.linalg import Precision

Named = TypeVar("Named", Contender, Row)
DEFAULT_SHAPES = {"cpu": "transformer-30m", "cuda": "llama-1b"}
ALWAYS = ("torch foreach", "torch fused")


def parser() -> argparse.ArgumentParser:
    """The parser of the options of `selective bench`."""
    command = argparse.ArgumentParser(prog="selective bench", description="Measure the cost of an optimizer's step.")
    add = command.add_argument
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="dtype of parameters and state")
    add("--shapes", nargs="+", choices=list(SHAPES), metavar="SHAPES", help=f"{', '.join(SHAPES)}; default: "
        "llama-1b on cuda, transformer-30m on a cpu")  # fmt: skip
    add("--only", metavar="TEXT", action="append", help="time only names with a word that begins with TEXT, and "
        "torch's; repeatable")  # fmt: skip
    add("--peers", action=argparse.BooleanOptionalAction, help="also time installed optimizers of other people "
        "(default: on cuda; some of them compile for a minute)")  # fmt: skip
    add("--controls", action="store_true", help="also time each policy's matched random control, on a CPU")
    add("--rotations", action="store_true", help="measure the cost of preconditioners instead: products, refreshes, "
        "memory")  # fmt: skip
    add("--first-step", action="store_true", help="measure the wait before training instead: the import, wrapping a "
        "base and the first step, in fresh processes on a CPU")  # fmt: skip
    add("--cpu-time", action="store_true", help="with --first-step: count the processor's seconds, for a busy machine")
    add("--rounds", type=_positive, help="number of timings of each optimizer (default: 7, and 5 with --training)")
    add("--threads", type=_positive, help="threads of torch (default: torch's own choice)")
    add("--json", metavar="FILE", type=Path, help="also write all measurements to FILE")
    add_options(command)
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Time optimizers, print a table, and on request write JSON. Returns the exit code.

    The code is 1 if an installed optimizer got no time, and 130 after Ctrl-C or the end of a time limit, with
    everything printed and written that was measured by then.
    """
    try:
        with Limit() as limit:
            return _main(argv, limit)
    except KeyboardInterrupt:  # before there were results to keep, or for the second time
        return report_interruption()


def _main(argv: Sequence[str] | None, limit: Limit) -> int:
    command = parser()
    options = command.parse_args(argv)
    if options.json and not options.json.absolute().parent.is_dir():
        command.error(f"--json {options.json}: the folder {options.json.absolute().parent} is not there; make it first")
    options.rounds = options.rounds or (5 if options.training else 7)
    if options.training and (options.rotations or options.first_step):
        command.error("--training, --rotations and --first-step measure different things: give one of them")
    if options.cpu_time and not options.first_step:
        command.error("--cpu-time goes with --first-step alone: optimizers' steps are timed by the clock on the wall")
    if options.first_step:
        return _first_step(command, options, limit)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        command.error("--device cuda: torch sees no CUDA device")
    dtype = getattr(torch, options.dtype)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.rotations:
        if options.only or options.dtype != "float32":
            command.error(
                "--rotations measures float32 parameters, and all that there is: leave --only and --dtype out"
            )
        return _rotations(options, device, limit)
    if options.training:
        return _training(command, options, device, limit)
    contenders = standard_contenders(device, dtype)
    if options.peers or (options.peers is None and device == "cuda"):
        contenders += peer_contenders()
    if options.controls:
        if device != "cpu":
            command.error("--controls measures the controls' CPU kernels: on cuda they run as torch code of their own")
        contenders += control_contenders() + control_contenders(statistics=True)
    if options.only:
        contenders = _chosen(command, contenders, options.only)
    _print_machine(device)
    results: list[Result] = []
    left_out = False
    for shapes in options.shapes or [DEFAULT_SHAPES[device]]:
        try:
            result = run(shapes, contenders, device=device, dtype=dtype, rounds=options.rounds, tell=_tell)
        except torch.OutOfMemoryError as error:
            print(f"{shapes}: parameters, gradients and AdamW's state do not fit on this device ({error})")
            left_out = True
            continue
        results.append(result)
        with limit.uninterrupted():
            print(f"\n{heading(result)}\n{table(result)}")
            if options.json:  # after each set of shapes, so that an interrupted run keeps its results
                options.json.write_text(json.dumps(as_json(results), indent=1))
        if result.interrupted or limit.interrupted:
            return report_interruption()
    refused = [m for result in results for m in result.measurements if m.outcome not in ("timed", "missing")]
    return int(left_out or bool(refused))


def _print_machine(device: str) -> None:
    facts = environment(device)
    print(f"{facts['gpu'] or facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}")


def _rotations(options: argparse.Namespace, device: str, limit: Limit) -> int:
    _print_machine(device)
    precisions: list[Precision] = ["float32", "tf32", "bfloat16"] if device == "cuda" else ["float32"]
    measured = []
    for shapes in options.shapes or [DEFAULT_SHAPES[device]]:
        result = measure_rotations(shapes, device=device, rounds=options.rounds, precisions=precisions, tell=_tell)
        measured.append(asdict(result))
        with limit.uninterrupted():
            print(f"\n{rotation_table(result)}")
            if options.json:
                options.json.write_text(json.dumps({**environment(device), "rotations": measured}, indent=1))
        if result.interrupted or limit.interrupted:
            return report_interruption()
    return 0


def _training(command: argparse.ArgumentParser, options: argparse.Namespace, device: str, limit: Limit) -> int:
    if options.shapes or options.dtype != "float32" or options.controls:
        command.error("--training measures models by --sets in float32, with the controls of two policies: leave "
                      "--shapes, --dtype and --controls out")  # fmt: skip
    _print_machine(device)

    def choose(rows: list[Row]) -> list[Row]:
        return _chosen(command, rows, options.only) if options.only else rows

    return training(options, device, limit, choose=choose, tell=_tell, refuse=command.error)


def _first_step(command: argparse.ArgumentParser, options: argparse.Namespace, limit: Limit) -> int:
    if options.only or options.shapes or options.rotations or options.dtype != "float32" or options.device == "cuda":
        command.error("--first-step measures models and policies of its own on the CPU: leave --only, --shapes, "
                      "--dtype, --rotations and --device cuda out")  # fmt: skip
    if options.threads:
        torch.set_num_threads(options.threads)
    _print_machine("cpu")
    clock = "process_time" if options.cpu_time else "perf_counter"
    first_steps = measure_first_steps(rounds=options.rounds, threads=options.threads, clock=clock, tell=_tell)
    with limit.uninterrupted():
        print(f"\n{first_step_table(first_steps)}")
        if options.json:
            options.json.write_text(json.dumps({**environment("cpu"), **first_steps_as_json(first_steps)}, indent=1))
    return report_interruption() if first_steps.interrupted or limit.interrupted else 0


def _chosen(command: argparse.ArgumentParser, contenders: list[Named], texts: list[str]) -> list[Named]:
    """The contenders with a word that begins with one of the texts, and torch's. A whole name counts as a word, too."""

    def has(contender: Named, text: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(text)}", contender.name, re.IGNORECASE) is not None

    for text in texts:
        if not any(has(contender, text) for contender in contenders):
            command.error(f"--only {text!r}: no name has it; there are {', '.join(c.name for c in contenders)}")
    return [c for c in contenders if c.name in ALWAYS or any(has(c, text) for text in texts)]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 1 on is needed")
    return int(text)


def _tell(text: str) -> None:
    print(text, file=sys.stderr)  # stdout is for the results


if __name__ == "__main__":
    sys.exit(main())
