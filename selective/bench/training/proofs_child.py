"""A process that checks rows for `proofs.py`, and takes first steps with them.

    python proofs_child.py DEVICE MODEL

It reads the names of rows from its input, one a line, and answers each by a line of JSON. The seconds are those of the
first step on the model's parameters, in which kernels may have to be compiled.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main(device: str, model: str) -> int:
    """Answer until the input ends. After an error of the device, with which nothing more can be done, return 3."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # other people's optimizers print
    from selective.bench.training.rows import training_rows

    rows = {row.name: row for row in training_rows(device)}
    for line in sys.stdin:
        answer = proof(rows[line.strip()], device, model)
        broken = "CUDA error" in (answer["refused"] or "")
        print(json.dumps({**answer, "ends": broken}), file=answers, flush=True)
        if broken:
            return 3
    return 0


def proof(row: Any, device: str, model: str) -> dict[str, Any]:
    """The outcome of a row's check, the reason if it has failed, and the seconds of a first step."""
    from selective.bench.clock import clock_of
    from selective.bench.measure import outcome_of
    from selective.bench.training.proofs import prove_here

    outcome, refused, seconds = prove_here(row, device)
    if refused is None:
        try:
            seconds = first_steps(row, device, model)
        except Exception as wrong:  # other people's optimizers may raise anything
            outcome, refused = outcome_of(wrong, row.contender)
    clock_of(device).settle()
    return {"outcome": outcome, "refused": refused, "seconds": seconds}


def first_steps(row: Any, device: str, model: str) -> float:
    """The seconds of the first step, after which further ones are taken, with statistics too, to compile everything."""
    from selective.bench.clock import clock_of
    from selective.bench.shapes import MODELS
    from selective.bench.training.groups import groups_of
    from selective.bench.workload import Workload

    workload = Workload([shape for _, shape in MODELS[model]], device)
    kinds = [kind for kind, _ in MODELS[model]]
    clock, taken = clock_of(device), []
    for contender in (row.contender, *([] if row.with_statistics is None else [row.with_statistics])):
        optimizer = contender.make_optimizer(groups_of(workload.params, kinds, row.policy_on))
        for _ in range(3):
            workload.hand_out()
            clock.synchronize()
            begun = time.perf_counter()
            optimizer.step()
            clock.synchronize()
            taken.append(time.perf_counter() - begun)
    return taken[0]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
