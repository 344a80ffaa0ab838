"""Checks sharded steps against steps of whole tensors, in every layout, on any number of GPUs or processes.

    python scripts/sharded.py --processes 4 --out results/sharded.json
    python scripts/sharded.py --processes 4 --layout hsdp fsdp-tp --check selections rotations

It starts the processes itself, over NCCL if there are GPUs, and over gloo otherwise. It prints a line for each check,
and exits with 1 if one has failed. `--out` writes what was measured. Under torchrun, on one host or several, it is one
of the processes:

    torchrun --nnodes 2 --nproc-per-node 8 ... scripts/sharded.py

Layouts: `fsdp` by rows and `fsdp-columns`, `hsdp` with two shards and as many replicas as that leaves, `fsdp-tp` with
tensor parallelism over two, and `ddp`. The checks, each of which its file in `sharded_checks` describes:

    selections   the same coordinates as on whole tensors, given the same updates: every base, every policy
    rotations    from one stored basis, on the side that is whole and gathered: the same end, to rounding
    replicas     all ranks have the same bits after 200 steps of training
    muon         torch's own sharded Muon, to its rounding, or the words in which it is refused
    waits        no step makes the host wait for the GPU
    resumed      examples/train_fsdp.py, killed and resumed on fewer processes (not under torchrun)
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from sharded_checks import results
from sharded_checks.layouts import LAYOUTS, Layout, unfit
from sharded_checks.muon import muon
from sharded_checks.optimizers import BASES
from sharded_checks.processes import Processes, Ranks, is_rank, join
from sharded_checks.replicas import replicas
from sharded_checks.results import Result
from sharded_checks.resumed import resumed
from sharded_checks.rotations import rotations
from sharded_checks.selections import selections
from sharded_checks.waits import waits

ON_RANKS = ("selections", "rotations", "replicas", "muon", "waits")
CHECKS = (*ON_RANKS, "resumed")
FAILED, CRASHED = 1, 2  # what a process ends with if a check has failed, and after an error


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--processes", type=int, nargs="+", help="numbers of processes, one after the other; default: all GPUs, or 4")
    add("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    add("--check", nargs="+", choices=CHECKS, default=list(CHECKS))
    add("--base", nargs="+", choices=BASES, default=list(BASES))
    add("--steps", type=int, default=200, help="steps of the training of `replicas`")
    add("--out", type=Path, help="JSON file of the results")
    add("--cpu", action="store_true", help="gloo, also where there are GPUs")
    add("--seconds", type=float, default=3000, help="limit of the processes of one run")
    return parser.parse_args(argv)


def checks_of(layout: Layout, args: argparse.Namespace) -> Iterator[Result]:
    """Run the checks of one layout on this rank."""
    functions: dict[str, Callable[[], Iterator[Result]]] = {
        "selections": lambda: selections(layout, args.base),
        "rotations": lambda: rotations(layout, args.base),
        "replicas": lambda: replicas(layout, args.steps),
        "muon": lambda: muon(layout),
        "waits": lambda: waits(layout),
    }
    for name in ON_RANKS:
        if name in args.check:
            yield from functions[name]()


def on_this_rank(args: argparse.Namespace) -> list[Result]:
    """Run all layouts as one of the processes. An error on one rank ends it, so that no other waits."""
    ranks, found = join(args.cpu), []
    try:
        for name in args.layout:
            reason = unfit(name, ranks.size)
            layout = Layout(name, ranks)
            every = checks_of(layout, args) if reason is None else [Result("all", name, "all", None, reason)]
            for result in every:
                result.processes = ranks.size
                found.append(results.agreed(ranks.gathered(result)))
                if ranks.rank == 0:
                    print(found[-1], flush=True)
                    _write(args, ranks, found)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(CRASHED)
    dist.barrier()
    return found


def _write(args: argparse.Namespace, ranks: Ranks, found: list[Result]) -> None:
    if args.out is not None:
        results.write(args.out, results.about(ranks.device), found)


def started(args: argparse.Namespace, argv: list[str], count: int, layout: str, checks: list[str]) -> list[Result]:
    """Start processes for these checks. After an error, those that have no result are started again, one by one."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        command = [sys.executable, str(Path(__file__).resolve()), *argv, "--out", str(out)]
        try:
            code = Processes([*command, "--layout", layout, "--check", *checks], count).wait(args.seconds)
            ended = f"ended with {code}" if code not in (0, FAILED) else ""
        except TimeoutError as error:
            ended = str(error)
        found = results.read(out)[1] if out.exists() else []
    if ended:
        found.append(Result(checks[0] if len(checks) == 1 else "all", layout, "the processes", False, ended, {}, count))
        print(found[-1], flush=True)
        for check in checks if len(checks) > 1 else ():
            if all(result.check != check for result in found):
                found += started(args, argv, count, layout, [check])
    return found


def resuming(args: argparse.Namespace) -> Iterator[Result]:
    """Kill and resume the example, for each number of processes and layout that it has."""
    layouts = [name for name in ("fsdp", "hsdp") if name in args.layout]
    for count, layout, asynchronous in itertools.product(args.processes, layouts, (False, True)):
        reason = unfit(layout, count)
        every = resumed(count, layout == "hsdp", asynchronous, args.cpu) if reason is None else ()
        try:
            for result in every or [Result("resumed", layout, "all", None, str(reason))]:
                result.processes = count
                yield result
        except (RuntimeError, TimeoutError) as error:  # a run that has ended early, or not at all
            print(error, file=sys.stderr)
            yield Result("resumed", layout, "all", False, str(error).splitlines()[0], {}, count)


def sittings(args: argparse.Namespace, argv: list[str]) -> Iterator[list[Result]]:
    """Run everything that was asked for, a part at a time, so that what is lost with an error is little."""
    checks = [check for check in ON_RANKS if check in args.check]
    for count, layout in itertools.product(args.processes, args.layout if checks else ()):
        yield started(args, argv, count, layout, checks)
    for result in resuming(args) if "resumed" in args.check else ():
        print(result, flush=True)
        yield [result]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = options(argv)
    if is_rank():
        found = on_this_rank(args)
        sys.stdout.flush()  # and no end of the interpreter, in which gloo's threads have aborted
        os._exit(FAILED if any(result.passed is False for result in found) else 0)
    gpus = 0 if args.cpu else torch.cuda.device_count()
    args.processes = args.processes or [gpus or 4]
    if gpus and max(args.processes) > gpus:
        raise SystemExit(f"--processes {max(args.processes)}: there are {gpus} GPUs; --cpu takes gloo")
    about = results.about(torch.device("cuda" if gpus else "cpu"))
    about["command"] = "python scripts/sharded.py " + " ".join(argv)
    found: list[Result] = []
    for more in sittings(args, argv):
        found += more
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            results.write(args.out, about, found)
    counts = [sum(result.passed is passed for result in found) for passed in (True, False, None)]
    print("{} ok, {} failed, {} not run".format(*counts))
    return int(counts[1] > 0)


if __name__ == "__main__":
    sys.exit(main())
