"""Processes over gloo that run all cases together, with one start of Python and torch.

A case is a function of a `World`. It is called on every rank, and raises if something is wrong. It does all collective
work first and compares afterwards, so that a failure on one rank leaves no other rank waiting. A process runs this file
as a script: `python sharded_world.py WORLD FOLDER MEETING CASE...`, with cases as `module:function`. It imports
everything once, and forks a process for each rank: four imports of torch would take longer than most cases.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import quick_interpreter
import torch
import torch.distributed as dist


@dataclass
class World:
    rank: int
    size: int
    folder: Path

    def mesh(self, *shape: int, names: tuple[str, ...] | None = None) -> Any:
        """A mesh of the first ranks, which all ranks make together; None on ranks outside of it."""
        from torch.distributed.device_mesh import DeviceMesh

        count = 1
        for size in shape:
            count *= size
        mesh = DeviceMesh("cpu", torch.arange(count).reshape(shape), mesh_dim_names=names)
        return mesh if self.rank < count else None


def main(rank: int, size: int, folder: Path, meeting: str, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/{meeting}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    found = {}
    for name in names:
        module, function = name.split(":")
        began = time.perf_counter()
        try:
            getattr(importlib.import_module(module), function)(World(rank, size, folder))
            found[name] = ""
            dist.barrier()
        except Exception:
            found[name] = traceback.format_exc()
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
        (folder / f"{rank}.json").write_text(json.dumps(found))
        if found[name]:
            os._exit(1)  # so that the others notice at once, not after a timeout
    os._exit(0)  # when the interpreter ends, gloo's threads have aborted processes that had all results


def run_cases(names: Sequence[str], size: int, folder: Path, seconds: float = 280) -> None:
    """Run these cases on `size` processes. Raises AssertionError with every failure."""
    folder.mkdir(parents=True, exist_ok=True)
    meeting = f"meeting-{time.monotonic_ns()}"  # unique to this start
    command = [sys.executable, __file__, str(size), str(folder), meeting, *names]
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a fork copies one thread only
    with open(folder / "all.log", "w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, **one_thread}
        )
    try:
        code = process.wait(seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    failures = []
    for rank in range(size):
        file = folder / f"{rank}.json"
        found = json.loads(file.read_text()) if file.exists() else {}
        failures += [f"rank {rank}, {name}:\n{text}" for name, text in found.items() if text]
        if not all(name in found for name in names) and not any(found.values()):
            said = "".join(file.read_text()[-3000:] for file in (folder / f"{rank}.log", folder / "all.log"))
            failures.append(f"rank {rank} has ended after {list(found)}:\n{said}")
    failures.sort(key=lambda text: "gloo" in text)  # failures of ranks that were left waiting come last
    assert not failures and code == 0, "\n".join([*failures, str(code)])


def fork(size: int, folder: Path, meeting: str, names: Sequence[str]) -> int:
    """Fork a process for each rank and wait for all of them. Returns how many ended otherwise than with 0."""
    for module in {name.partition(":")[0] for name in names}:
        importlib.import_module(module)
    for rank in range(size):
        (folder / f"{rank}.log").touch()
        if os.fork() == 0:
            log = os.open(folder / f"{rank}.log", os.O_WRONLY)
            os.dup2(log, 1)
            os.dup2(log, 2)
            main(rank, size, folder, meeting, names)  # ends the process
    return sum(os.wait()[1] != 0 for _ in range(size))


if __name__ == "__main__":
    quick_interpreter.install()
    sys.exit(fork(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:]))
