"""Claims on runs, so that several processes share the work: each run is one process's until its file is there."""

from __future__ import annotations

import fcntl
import hashlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar


class HasFile(Protocol):
    """A run. `file` is the path of its record below the folder of all results."""

    @property
    def file(self) -> str: ...


AnyRun = TypeVar("AnyRun", bound=HasFile)


@contextmanager
def claimed(out: Path, run: HasFile) -> Iterator[bool]:
    """Yield True if this process may do the run. The claim ends with the context, or with the process."""
    folder = Path(tempfile.gettempdir(), f"gain-{hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]}")
    folder.mkdir(exist_ok=True)
    with (folder / run.file.replace("/", "--")).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield not (out / run.file).exists()


def next_run(out: Path, deadline: float, wanted: Callable[[], Iterable[AnyRun]]) -> Iterator[AnyRun]:
    """Yield one of the runs that are wanted after the other, and hold a claim on it meanwhile.

    `wanted` is called again each time, because it may depend on results. If all runs that are left are claimed, it
    waits until one is free, or until the deadline (`time.perf_counter`).
    """
    while True:
        left = [run for run in wanted() if not (out / run.file).exists()]
        if not left:
            return
        for run in left:
            with claimed(out, run) as mine:
                if mine:
                    yield run
                    break
        else:
            if time.perf_counter() > deadline:
                return
            time.sleep(1)
