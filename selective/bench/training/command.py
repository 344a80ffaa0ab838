"""The command line of `selective bench --training`."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence

from selective.bench.limit import Limit, report_interruption
from selective.bench.shapes import MODELS
from selective.bench.training.measure import TrainingRig
from selective.bench.training.profile import profile_text
from selective.bench.training.proofs import Proven, prove_apart, prove_here
from selective.bench.training.records import RowMeasurement, TrainingResult
from selective.bench.training.report import one_line, training_heading, training_json, training_table
from selective.bench.training.rows import Row, training_rows

SETS = ("llama-34m", "llama-110m", "gpt2", "conv")
PROOF_SHARE = 0.5  # of a time limit: checks that have not ended by then are given up


def add_options(command: argparse.ArgumentParser) -> None:
    """The options that go with `--training` alone."""
    add = command.add_argument_group("with --training").add_argument
    add("--training", action="store_true", help="measure steps as training takes them instead: in a model's "
        "groups, many in a row, with the time of host and device, launches, memory, and the first step")  # fmt: skip
    add("--sets", nargs="+", choices=list(MODELS), metavar="MODEL", help=f"{', '.join(MODELS)}; default: "
        f"{' '.join(SETS)}")  # fmt: skip
    add("--groups", nargs="+", choices=["all", "matrices"], default=["all", "matrices"], help="the groups with the "
        "policy: all, or those of matrices with the rest dense (default: both, one after the other)")  # fmt: skip
    add("--seconds", type=float, metavar="S", help="begin nothing that would not end within so many seconds")
    add("--workers", type=int, metavar="N", help="processes that check and compile at the same time (default: as many "
        "as there are cores, up to 16, on cuda; 0 on a cpu, which is this process alone)")  # fmt: skip
    add("--new-gradients", action="store_true", help="every step finds its gradients in other tensors, as after "
        "zero_grad()")  # fmt: skip
    add("--untouched", type=share, default=0.0, metavar="SHARE", help="the share of an embedding's rows that has no "
        "gradient, because their tokens are not in the batch (default: 0)")  # fmt: skip
    add("--profile", metavar="NAME", help="only say where the time of this row's step goes, on the host and on the "
        "device")  # fmt: skip


def share(text: str) -> float:
    """Return a number from 0 to 1. Raises ValueError, which argparse says in its own words."""
    number = float(text)
    if not 0 <= number <= 1:
        raise ValueError(text)
    return number


def training(
    options: argparse.Namespace, device: str, limit: Limit, *, choose: Callable[[list[Row]], list[Row]],
    tell: Callable[[str], None], refuse: Callable[[str], None],
) -> int:  # fmt: skip
    """Run the command. `choose` picks rows by `--only`; `refuse` ends the command with a message. Returns the code."""
    rows = training_rows(device, options.groups, peers=options.peers is not False)
    sets: Sequence[str] = options.sets or SETS
    if options.profile is not None:
        row = {row.name.casefold(): row for row in rows}.get(options.profile.casefold())
        if row is None:
            refuse(f"--profile {options.profile!r}: no row is called so; there are {', '.join(r.name for r in rows)}")
            return 2
        for model in sets:
            print(profile_text(row, model, device))
        return 0
    rows = choose(rows)
    deadline = None if options.seconds is None else time.monotonic() + options.seconds
    results: list[TrainingResult] = []

    def save(_: object = None) -> None:
        if options.json:
            with limit.uninterrupted():  # and the file is whole at any time, for a run that is killed
                whole = options.json.with_name(f"{options.json.name}.new")
                whole.write_text(json.dumps(training_json(results, device), indent=1))
                whole.replace(options.json)

    proof = _proof(rows, device, sets[0], options, deadline, tell)
    for model in sets:
        rig = TrainingRig(
            model, device, proof=proof, rounds=options.rounds, new_gradients=options.new_gradients,
            untouched=options.untouched, deadline=deadline,
            tell=lambda what: tell(one_line(what) if isinstance(what, RowMeasurement) else what), save=save,
        )  # fmt: skip
        results.append(rig.result)
        rig.run(rows)
        with limit.uninterrupted():
            print(f"\n{training_heading(rig.result)}\n\n{training_table(rig.result)}", flush=True)
        save()
        if rig.result.interrupted or limit.interrupted:
            return report_interruption()
        del rig
    wrong = [
        m for result in results for m in result.measurements if m.outcome in ("mismatch", "failed", "out of memory")
    ]
    return int(bool(wrong))


def _proof(
    rows: Sequence[Row], device: str, model: str, options: argparse.Namespace, deadline: float | None,
    tell: Callable[[str], None],
) -> Callable[[Row], Proven]:  # fmt: skip
    """A function that says how a row's check has gone. With workers, all checks are made first."""
    workers = options.workers
    if workers is None:
        workers = min(16, os.cpu_count() or 1) if device == "cuda" else 0
    checked: dict[str, Proven] = {}
    if workers == 0:

        def here(row: Row) -> Proven:
            if row.name not in checked:
                checked[row.name] = prove_here(row, device)
            return checked[row.name]

        return here
    until = None if deadline is None else time.monotonic() + PROOF_SHARE * (deadline - time.monotonic())
    checked = prove_apart(rows, device, model, workers, deadline=until, tell=tell)
    return lambda row: checked.get(row.name, ("no time left", "its check did not end in time", None))
