"""Proofs of rows: in this process, or in several fresh ones that check and compile at the same time.

A kernel takes seconds to compile, and a row has up to a dozen. What the other processes compile, this one finds in
Triton's cache on the disk. A row that breaks the device breaks it in a process of its own.
"""

from __future__ import annotations

import json
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from selective.bench.fresh_process import command_of, environment_of
from selective.bench.measure import Outcome, outcome_of
from selective.bench.training.prove import prove
from selective.bench.training.rows import Row

CHILD = Path(__file__).with_name("proofs_child.py")
Proven = tuple[Outcome, str | None, float | None]  # the outcome, the reason why there will be no time, a first step


def prove_here(row: Row, device: str) -> Proven:
    """Check a row in this process."""
    try:
        prove(row, device)
    except Exception as wrong:  # other people's optimizers may raise anything
        return (*outcome_of(wrong, row.contender), None)
    return "timed", None, None


def prove_apart(
    rows: Sequence[Row], device: str, model: str, workers: int, *,
    deadline: float | None = None, tell: Callable[[str], None] | None = None,
) -> dict[str, Proven]:  # fmt: skip
    """Check rows in `workers` processes, and take first steps there on the parameters of `model`.

    A process that ends is replaced, and the row that it had says so. Returns the proofs by the rows' names, without
    those that were not there at the deadline (`time.monotonic`).
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for row in rows:
        if row.contender.missing is None:
            waiting.put(row.name)
    proofs: dict[str, Proven] = {}
    children: list[_Child] = [_Child(device, model) for _ in range(workers)]
    threads = [threading.Thread(target=_work, args=(child, waiting, proofs, tell), daemon=True) for child in children]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and (deadline is None or time.monotonic() < deadline):
                thread.join(0.2)  # in short pieces, so that Ctrl-C comes through
    finally:
        for child in children:
            child.give_up()
    return dict(proofs)


class _Child:
    """A process that is started for the first row, and again after it has ended."""

    def __init__(self, device: str, model: str) -> None:
        self._command = command_of(CHILD, device, model)
        self._running: _Running | None = None
        self._lock = threading.Lock()
        self._given_up = False

    def ask(self, name: str) -> Proven | None:
        """The child's proof of a row; None if the child was given up meanwhile.

        Where a process ends that has answered for other rows before, one of those may have broken it. So the row is
        asked for again in a fresh one.
        """
        while True:
            with self._lock:
                if self._given_up:
                    return None
                self._running = running = self._running or _Running(self._command)
            was_fresh = running.is_fresh
            line = running.answer(name)
            said: dict[str, Any] = json.loads(line) if line else {"ends": True}
            ending = self._drop(running) if said["ends"] else ""
            if ending is None:
                return None
            if line:
                return said["outcome"], said["refused"], said["seconds"]
            if was_fresh:
                return "failed", f"the process that checked it {ending}", None

    def _drop(self, running: _Running) -> str | None:
        """Take leave of a process that ends. Returns how it has ended; None if the child was given up meanwhile."""
        with self._lock:
            if self._given_up:
                return None
            self._running = None
        return running.end()

    def give_up(self) -> None:
        """End the process."""
        with self._lock:
            self._given_up = True
            if self._running is not None:
                self._running.kill()


class _Running:
    """A process with its pipes, and a file with what it has said of errors."""

    def __init__(self, command: list[str]) -> None:
        self.is_fresh = True  # it has answered for no row yet
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env=environment_of(),
        )  # fmt: skip

    def answer(self, name: str) -> str:
        """The line that it says about a row; nothing if it has ended."""
        given, said = self._process.stdin, self._process.stdout
        assert given is not None and said is not None
        try:
            given.write(f"{name}\n")
            given.flush()
            line = said.readline()
        except (BrokenPipeError, ValueError):  # a ValueError if `kill` has closed the pipes
            return ""
        self.is_fresh = False
        return line

    def end(self) -> str:
        """Say with what code it has ended, and the last line of its errors."""
        code = self._process.wait()
        self._errors.seek(0)
        last = "".join(self._errors.read().strip().splitlines()[-1:])
        self._close()
        return f"ended with code {code}: {last}"

    def kill(self) -> None:
        """End it. A thread that waits for its answer gets none."""
        self._process.kill()
        self._process.wait()
        self._close()

    def _close(self) -> None:
        for file in (self._process.stdin, self._process.stdout, self._errors):
            if file is not None:
                with suppress(BrokenPipeError):  # what was written for a process that has ended
                    file.close()


def _work(
    child: _Child, waiting: queue.SimpleQueue[str], proofs: dict[str, Proven], tell: Callable[[str], None] | None
) -> None:
    while True:
        try:
            name = waiting.get_nowait()
        except queue.Empty:
            return
        proof = child.ask(name)
        if proof is None:
            return
        proofs[name] = proof
        if tell is not None:
            tell(f"checked {name}" + ("" if proof[1] is None else f": {proof[0]}"))
