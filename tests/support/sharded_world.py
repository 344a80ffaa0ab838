"""Processes over gloo that run cases together, with one start of Python and torch for all sets of them.

A case is a function of a `World`. It is called on every rank, and raises if something is wrong. It does all collective
work first and compares afterwards, so that a failure on one rank leaves no other rank waiting.

A process runs this file as a script and imports everything once. For every line on its standard input, a `Request` in
JSON, it forks a set of ranks and answers with two lines: the number of the set's process group, and how many ranks have
failed. Imports of torch in every rank would take longer than most cases.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import quick_interpreter
import torch
import torch._dynamo  # which the first step of an optimizer imports: before the ranks are forked
import torch.distributed as dist


@dataclass
class World:
    rank: int
    size: int
    folder: Path
    meshes: dict[Any, Any] = field(default_factory=dict)

    def mesh(self, *shape: int, names: tuple[str, ...] | None = None) -> Any:
        """A mesh of the first ranks, which all ranks make together; None on ranks outside of it.

        Each mesh is made once: its process groups are connections between all ranks.
        """
        from torch.distributed.device_mesh import DeviceMesh

        count = math.prod(shape)
        if (shape, names) not in self.meshes:
            ranks = torch.arange(count).reshape(shape)
            self.meshes[shape, names] = DeviceMesh("cpu", ranks, mesh_dim_names=names)
        return self.meshes[shape, names] if self.rank < count else None


@dataclass
class Request:
    """A set of ranks: `size` of them, which meet at the file `meeting` in `folder` and run cases `module:function`."""

    size: int
    folder: str
    meeting: str
    names: list[str]


def run_as_rank(rank: int, request: Request) -> NoReturn:
    """Run the cases of a request as one of its ranks, and end the process."""
    torch.set_num_threads(1)
    folder = Path(request.folder)
    meeting = f"file://{folder}/{request.meeting}"
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=request.size, timeout=timeout)
    world, results = World(rank, request.size, folder), {}
    for name in request.names:
        module, function = name.split(":")
        began = time.perf_counter()
        try:
            getattr(importlib.import_module(module), function)(world)
            results[name] = ""
            dist.barrier()
        except Exception:
            results[name] = traceback.format_exc()
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
        (folder / f"{rank}.json").write_text(json.dumps(results))
        if results[name]:
            os._exit(1)  # so that the others notice at once, not after a timeout
    os._exit(0)  # when the interpreter ends, gloo's threads have aborted processes that had all results


def fork_ranks(request: Request) -> NoReturn:
    """Fork a process for each rank, in a process group of their own, and wait for them. Ends with how many failed."""
    os.setsid()
    for rank in range(request.size):
        log = os.open(Path(request.folder) / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
        if os.fork() == 0:
            os.dup2(log, 1)
            os.dup2(log, 2)
            run_as_rank(rank, request)
        os.close(log)
    os._exit(sum(os.wait()[1] != 0 for _ in range(request.size)))


def serve() -> None:
    """Fork a set of ranks for each request, one after the other, until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # so that nothing else is taken for an answer
    quick_interpreter.install()
    for line in sys.stdin:
        request = Request(**json.loads(line))
        for module in {name.partition(":")[0] for name in request.names}:
            importlib.import_module(module)
        group = os.fork()
        if group == 0:
            fork_ranks(request)
        print(group, file=answers)
        print(os.waitstatus_to_exitcode(os.waitpid(group, 0)[1]), file=answers)


class Starter:
    """The process that forks sets of ranks, seen from a test. It is started by the first set."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, names: Sequence[str], size: int, folder: Path, seconds: float = 280) -> None:
        """Run these cases on `size` ranks. Raises AssertionError with every failure."""
        folder.mkdir(parents=True, exist_ok=True)
        meeting = f"meeting-{time.monotonic_ns()}"  # unique to this set
        failed = self._answer(Request(size, str(folder), meeting, list(names)), seconds)
        failures = []
        for rank in range(size):
            file = folder / f"{rank}.json"
            results = json.loads(file.read_text()) if file.exists() else {}
            failures += [f"rank {rank}, {name}:\n{text}" for name, text in results.items() if text]
            if not all(name in results for name in names) and not any(results.values()):
                logs = (file.read_text()[-3000:] for file in (folder / f"{rank}.log", self.log) if file.exists())
                failures.append(f"rank {rank} has ended after {list(results)}:\n{''.join(logs)}")
        failures.sort(key=lambda text: "gloo" in text)  # failures of ranks that were left waiting come last
        assert not failures and failed == 0, "\n".join([*failures, f"{failed} ranks have failed"])

    def _answer(self, request: Request, seconds: float) -> int:
        """Have the ranks run, and kill those that are left when it is over, or takes too long."""
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(vars(request)).encode() + b"\n")
        group = int(process.stdout.readline())
        try:
            ended = bool(select.select([process.stdout], [], [], seconds)[0])
        except BaseException:  # interrupted: the answer is not read any more
            self.stop()
            raise
        finally:
            with contextlib.suppress(ProcessLookupError):  # all have ended
                os.killpg(group, signal.SIGKILL)
        failed = int(process.stdout.readline())
        assert ended, f"{request.names} have not ended after {seconds} s"
        return failed

    def _started(self) -> subprocess.Popen[bytes]:
        if self.process is None:
            one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a fork copies one thread only
            with open(self.log, "w") as log:
                self.process = subprocess.Popen(
                    [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0,
                    start_new_session=True, env={**os.environ, **one_thread},
                )  # fmt: skip
        return self.process

    def stop(self) -> None:
        """End the process, which waits for no set any more."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


if __name__ == "__main__":
    serve()
