"""Runs examples/checkpointed_training.py in processes that get SIGKILL at a moment of our choice.

They are forked off a nursery: a fresh interpreter that has trained two steps, so that torch and all imports of a first
step are loaded, and a process starts in milliseconds, not seconds.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

EXAMPLE = Path(__file__).parents[2] / "examples" / "checkpointed_training.py"
MOMENTS = (
    "step",
    "open",
    "half written",
    "fsync",
    "replace",
    "replaced",
)  # all but the first are inside of a checkpoint


class Countdown:
    """Kills its own process at the `number`-th moment of one kind."""

    def __init__(self, moment: str | None, number: int) -> None:
        self.moment, self.left = moment, number

    def at(self, moment: str) -> None:
        if moment == self.moment:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


class HalfWritten:
    """A file that is written in two parts, with a moment between them."""

    def __init__(self, file: Any, countdown: Countdown) -> None:
        self.file, self.countdown = file, countdown

    def __enter__(self) -> HalfWritten:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, content: bytes) -> None:
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        self.countdown.at("half written")
        self.file.write(content[len(content) // 2 :])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def watched(example: ModuleType, countdown: Countdown) -> None:
    """Let the example pass the moments, without a change of its code."""

    def opened(*args: Any) -> HalfWritten:
        file = HalfWritten(open(*args), countdown)
        countdown.at("open")
        return file

    def fsync(number: int) -> None:
        countdown.at("fsync")  # no test can see its effect on a machine that stops, and it is slow

    def replace(old: Path, new: Path) -> None:
        countdown.at("replace")
        os.replace(old, new)
        countdown.at("replaced")

    plain_step: Callable[[Any], None] = example.Run.step  # type: ignore[attr-defined]

    def step(run: Any) -> None:
        countdown.at("step")
        plain_step(run)

    example.open, example.os = opened, SimpleNamespace(fsync=fsync, replace=replace)  # type: ignore[attr-defined]
    example.Run.step = step  # type: ignore[attr-defined]


def not_atomic(example: ModuleType) -> None:
    """Write over the old checkpoint, which is the obvious way, and wrong."""

    def write(path: Path, content: bytes) -> None:
        with example.open(path, "wb") as file:  # type: ignore[attr-defined]
            file.write(content)

    example.write_atomically = write  # type: ignore[attr-defined]


def go(folder: str, steps: int, atomic: bool = True, moment: str | None = None, number: int = 1) -> None:
    """The work of a process: train on from the last checkpoint."""
    spec = importlib.util.spec_from_file_location("checkpointed_training", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.STEPS = steps  # type: ignore[attr-defined]
    watched(example, Countdown(moment, number))
    if not atomic:
        not_atomic(example)
    example.train(Path(folder))  # type: ignore[attr-defined]


def nursery() -> None:
    """Fork a process for each line of JSON, which has arguments of `go`. Print its number, and its end."""
    import torch

    torch.set_num_threads(1)  # a process with threads must not be forked
    with tempfile.TemporaryDirectory() as folder:
        go(folder, 2)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                go(**json.loads(line))
                code = 0
            finally:
                os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


class Nursery:
    """The parent's side of a nursery: starts processes one after the other."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def attempt(self, folder: Path, steps: int, *, seconds: float | None = None, **options: Any) -> int:
        """The exit code (-9: killed) of a process that is killed from within, from outside, or not at all."""
        folder.mkdir(exist_ok=True)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"folder": str(folder), "steps": steps, **options}) + "\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        if seconds is not None:
            time.sleep(seconds)
            with contextlib.suppress(ProcessLookupError):  # the process has ended
                os.kill(child, signal.SIGKILL)
        return int(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


if __name__ == "__main__":
    nursery()
