"""Row 18: two processes under `DistributedDataParallel`, over gloo."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from selective.testing.harness import CheckFailed, NotApplicable, Skipped, require
from selective.testing.replica import UNKNOWN_HERE
from selective.testing.report import stack_checks
from selective.testing.subject import Subject

_WORLD, _SECONDS = 2, 180


@stack_checks.register(18, "replicas drift apart without an error: what is saved is one of several models.")
def replicas_stay_identical(subject: Subject) -> None:
    """After 6 steps under DDP on two processes, each with data and global seeds of its own, parameters are the same
    bits."""
    if not dist.is_available() or not dist.is_gloo_available():
        raise Skipped("this build of torch has no gloo")
    try:
        pickled = pickle.dumps(subject)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise NotApplicable(f"the subject can't be sent to another process ({error})") from error
    if b"__main__" in pickled:
        raise NotApplicable("the subject can't be sent to another process (it is defined in the script that runs)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "subject").write_bytes(pickled)
        (folder / "path.json").write_text(json.dumps([str(Path(entry or ".").resolve()) for entry in sys.path]))
        codes = _run(folder)
        if any(codes):
            logs = [(folder / f"{rank}.log").read_text().strip().splitlines() for rank in range(_WORLD)]
            last = next((lines[-1] for lines, code in zip(logs, codes, strict=True) if code and lines), "nothing")
            if UNKNOWN_HERE in codes:
                raise NotApplicable(f"the subject can't be built in another process ({last})")
            raise CheckFailed(f"a replica failed: {last}")
        first, *others = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(_WORLD))
    for other in others:
        apart = {key: (value - other[key]).abs().max().item() for key, value in first.items()}
        worst = max(apart, key=lambda key: apart[key])
        same = all(torch.equal(value, other[key]) for key, value in first.items())
        require(same, f"after 6 steps, parameter {worst!r} differs between two replicas by up to {apart[worst]:.2g}.")


def _run(folder: Path) -> list[int]:
    """Run both ranks to their end. Returns their exit codes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = str(Path(__file__).with_name("replica.py"))
    running: list[subprocess.Popen] = []
    try:
        for rank in range(_WORLD):
            with open(folder / f"{rank}.log", "w") as log:
                command = [sys.executable, script, str(rank), str(_WORLD), str(folder)]
                running.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
        return [process.wait(_SECONDS) for process in running]
    except subprocess.TimeoutExpired as error:
        raise CheckFailed(f"the replicas did not come to an end in {_SECONDS} seconds.") from error
    finally:
        for process in running:
            process.kill()
            process.wait()
