"""Executes training runs one after another in this process, or several at a time in processes of their own.

Small models use one core well and two cores badly (a step of 0.9M parameters: 79 ms of one core, 105 ms of two cores
together), so runs are spread over processes of one thread each. Processes are spawned, talk through pipes, and ignore
Ctrl-C: the one that started them tells them to stop, and each then saves the run it is in.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch

from selective.compare import data
from selective.compare.config import CompareConfig, build
from selective.compare.contenders import Run, runs
from selective.compare.train import Record, Trainer


@dataclass(frozen=True)
class Progress:
    """The message that a run has taken a step, or goes on from a checkpoint after `done` steps."""

    slot: int
    key: str
    done: int
    loss: float | None


Handler = Callable[[Progress | Record], None]


class WorkerFailed(RuntimeError):
    """Raised if a run fails or its process dies. The message names the run, and says what is known."""


def train(
    config: CompareConfig,
    run: Run,
    text: data.Text,
    checkpoint: Path,
    stop: Callable[[], bool],
    tell: Callable[[Any], None],
) -> Record:
    """Train one run, from its checkpoint if there is one. `tell` gets (key, steps done, loss) for each step."""
    trainer = Trainer(config, run, text)
    if checkpoint.exists():
        trainer.load(checkpoint)
    tell((run.key, trainer.done, None))
    return trainer.go(stop, lambda done, loss: tell((run.key, done, loss)), checkpoint)


class Stop:
    """A flag that Ctrl-C or SIGTERM sets inside of `listening`. A second one raises KeyboardInterrupt.

    A second signal within a second of the first is ignored, because `timeout`, and programs that pass signals on,
    deliver a Ctrl-C twice.
    """

    def __init__(self) -> None:
        self.since: float | None = None

    def __call__(self) -> bool:
        return self.since is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers; in other threads the caller handles Ctrl-C
            return
        old = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.since is None:
            self.since = time.monotonic()
        elif time.monotonic() - self.since > 1:
            raise KeyboardInterrupt


def here(
    config: CompareConfig, todo: Sequence[Run], text: data.Text, checkpoints: Path, stop: Stop, handle: Handler
) -> None:
    """Execute all runs in this process. `handle` gets a Progress for each step and the record of each run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        for run in todo:
            if stop():
                return
            path = checkpoints / f"{run.key}.pt"
            handle(train(config, run, text, path, stop, lambda told: handle(Progress(0, *told))))
    finally:
        torch.set_num_threads(threads)


def apart(
    config: CompareConfig,
    todo: Sequence[Run],
    text: data.Text,
    checkpoints: Path,
    workers: int,
    stop: Stop,
    handle: Handler,
) -> None:
    """Execute all runs in `workers` processes; each takes the next run when it is free. Raises WorkerFailed."""
    place = {run.key: index for index, run in enumerate(runs(config))}
    waiting = [place[run.key] for run in todo]
    pipes = _start(config, min(workers, len(todo)), text.fingerprint, checkpoints)
    told_to_stop = False
    try:
        for connection in pipes:
            connection.send(waiting.pop(0))
        while pipes:  # a pipe is removed when its process has ended
            if stop() and not told_to_stop:
                told_to_stop = True
                for connection in pipes:
                    _send(connection, None)
            for connection in wait(list(pipes), timeout=0.2):
                connection = cast(Connection, connection)
                slot, process = pipes[connection]
                message = _receive(connection, process)
                if message is None:
                    del pipes[connection]
                elif isinstance(message, tuple):
                    handle(Progress(slot, *message))
                else:
                    if not told_to_stop:
                        _send(connection, waiting.pop(0) if waiting else None)
                    handle(message)
    except KeyboardInterrupt:  # the second Ctrl-C: end at once; the last checkpoints remain
        for _, process in pipes.values():
            process.kill()
        raise
    finally:
        for connection in pipes:
            connection.close()  # a process that still trains takes this as the signal to stop: it saves and ends
        for _, process in pipes.values():
            process.join()


def _start(config: CompareConfig, count: int, fingerprint: str, checkpoints: Path) -> dict[Connection, tuple[int, Any]]:
    context = multiprocessing.get_context("spawn")
    started: dict[Connection, tuple[int, Any]] = {}
    main = threading.current_thread() is threading.main_thread()
    old = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None  # inherited by processes from their start
    try:
        for slot in range(count):
            ours, theirs = context.Pipe()
            arguments = (theirs, config.model_dump_json(), fingerprint, str(checkpoints))
            process = context.Process(target=_work, args=arguments, daemon=True, name=f"selective-compare-{slot}")
            process.start()
            theirs.close()
            started[ours] = (slot, process)
    finally:
        if main:
            signal.signal(signal.SIGINT, old)
    return started


def _send(connection: Connection, message: Any) -> None:
    try:
        connection.send(message)
    except (BrokenPipeError, ConnectionResetError):
        return  # the process has ended; its last message, still to be received, says why


def _receive(connection: Connection, process: Any) -> Any:
    """The next message of a process; None if it has ended regularly. Raises WorkerFailed if it failed."""
    try:
        message = connection.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        if process.exitcode == 0:
            return None
        raise WorkerFailed(
            f"{process.name} died with exit code {process.exitcode} (a negative one is the signal that killed it, -9 "
            "is most often a lack of memory: lower --workers or the model). What was finished is kept; go on with "
            "--resume"
        ) from None
    if isinstance(message, str):
        raise WorkerFailed(message)
    return message


def _work(connection: Connection, config_json: str, fingerprint: str, checkpoints: str) -> None:
    """The main function of a worker: receives indices into `runs(config)`, sends progress and records, ends at None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    key = "before its first run"
    try:
        config = build(json.loads(config_json))
        torch.set_num_threads(config.threads)
        text = data.load(config.data, config.model.context, config.loop.batch)
        if text.fingerprint != fingerprint:
            raise RuntimeError(f"{text.source} has changed since the comparison started")
        all_runs = runs(config)
        while (index := connection.recv()) is not None:
            run = all_runs[index]
            key = run.key
            path = Path(checkpoints) / f"{key}.pt"
            # Anything that arrives during a run means stop, and so does the closing of the other end.
            _send(connection, train(config, run, text, path, connection.poll, lambda told: _send(connection, told)))
    except EOFError:
        return  # the parent process is gone, and the run is saved
    except Exception:  # an optimizer or a policy may raise anything; the parent gets the traceback as a WorkerFailed
        _send(connection, f"run {key} failed:\n{traceback.format_exc()}")
