"""Executes training runs one after another in this process, or several at a time in processes of their own.

Small models use one core well and two cores badly (a step of 0.9M parameters: 79 ms of one core, 105 ms of two cores
together), so runs are spread over processes of one thread each. Where there are several GPUs, each process has one.
Processes are spawned, talk through pipes, and ignore Ctrl-C: the one that started them tells them to stop, and each
then saves the run it is in. A run that fails costs nothing but itself: it is recorded as failed. If its process died, a
new one takes its place.
"""

from __future__ import annotations

import json
import multiprocessing
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch

from selective.base.generators import generators_restored
from selective.compare.config import ConfigError, build
from selective.compare.contenders import Run, longest_first, runs
from selective.compare.devices import devices
from selective.compare.optimizers import name_of_maker
from selective.compare.setup import Given, Setup, prepare
from selective.compare.task import name_of
from selective.compare.train import Record, Trainer, new_record


@dataclass(frozen=True)
class Progress:
    """The message that a run has taken a step, or goes on from a checkpoint after `done` steps."""

    slot: int
    key: str
    done: int
    loss: float | None


Handler = Callable[[Progress | Record], None]


class WorkerFailed(RuntimeError):
    """Raised if no process can be started for the runs. The message says what is known."""


def train(
    setup: Setup, run: Run, checkpoint: Path, stop: Callable[[], bool], tell: Callable[[Any], None]
) -> Record:  # fmt: skip
    """Train one run, from its checkpoint if there is one. `tell` gets (key, steps done, loss) for each step."""
    trainer = Trainer(setup, run)
    if checkpoint.exists():
        trainer.load(checkpoint)
    tell((run.key, trainer.done, None))
    return trainer.go(stop, lambda done, loss: tell((run.key, done, loss)), checkpoint)


def failed(run: Run, reason: str, done: int = 0, details: str = "") -> Record:
    """The record of a run that came to no end, with the reason in a line and the whole traceback if there is one."""
    return {**new_record(run), "failed": reason, "traceback": details, "steps_done": done}


def attempt(
    setup: Setup, run: Run, checkpoint: Path, stop: Callable[[], bool], tell: Callable[[Any], None]
) -> Record:  # fmt: skip
    """`train`, with a record of the failure if the run raises an error."""
    done = 0

    def note(told: Any) -> None:
        nonlocal done
        done = told[1]
        tell(told)

    try:
        return train(setup, run, checkpoint, stop, note)
    except Exception as error:  # a task, an optimizer or a policy may raise anything
        message = " ".join(str(error).split())
        return failed(run, f"{type(error).__name__}: {message}"[:300], done, traceback.format_exc())


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


def here(setup: Setup, todo: Sequence[Run], checkpoints: Path, stop: Stop, handle: Handler) -> None:
    """Execute all runs in this process. `handle` gets a Progress for each step and the record of each run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(setup.config.threads)
    setup = _on(setup, devices(setup.config)[0])
    try:
        for run in todo:
            if stop():
                return
            path = checkpoints / f"{run.key}.pt"
            with generators_restored():
                record = attempt(setup, run, path, stop, lambda told: handle(Progress(0, *told)))
            if record["failed"] and torch.device(setup.config.device).type == "cuda":
                torch.cuda.empty_cache()  # what a run held that lacked memory
            handle(record)
    finally:
        torch.set_num_threads(threads)


def _on(setup: Setup, device: str) -> Setup:
    return replace(setup, config=setup.config.model_copy(update={"device": device}))


def apart(
    setup: Setup, given: Given, todo: Sequence[Run], checkpoints: Path, workers: int, stop: Stop, handle: Handler
) -> None:
    """Execute all runs in `workers` processes; each takes the next run when it is free, of a seed the longest first.

    Raises:
        WorkerFailed: a process can't set the comparison up, or none can be started.
        ConfigError: the task or a function that was handed over can't be sent to a process.
    """
    _check_can_be_sent(given)
    Pool(setup, given, todo, checkpoints, stop, handle).run(min(workers, len(todo)))


def _check_can_be_sent(given: Given) -> None:
    try:
        pickle.dumps(given)
    except Exception as error:  # pickle raises whatever an object's own code does
        named = [*([] if given.task is None else [name_of(given.task)]), *given.makers]
        named += [] if given.base is None else [name_of_maker(given.base)]
        raise ConfigError(
            f"{', '.join(named)}: cannot be sent to worker processes ({error}). Define classes and functions at the "
            "top of a module, not inside of a function; or run everything in this process with workers=1"
        ) from error


@dataclass
class _Worker:
    """A process, and the run that it has been given."""

    slot: int
    process: Any
    ready: bool = False  # it has set the comparison up
    run: Run | None = None
    done: int = 0  # steps of that run


class Pool:
    """The processes of a comparison, and the runs that are left to do."""

    def __init__(
        self, setup: Setup, given: Given, todo: Sequence[Run], checkpoints: Path, stop: Stop, handle: Handler
    ) -> None:
        self._setup, self._given, self._checkpoints = setup, given, checkpoints
        self._stop, self._handle = stop, handle
        self._place = {run.key: index for index, run in enumerate(runs(setup.config))}
        self._waiting = longest_first(todo)
        self._workers: dict[Connection, _Worker] = {}
        self._stopping = False

    def run(self, count: int) -> None:
        """Start `count` processes and let them work until nothing is left to do."""
        try:
            for slot in range(count):
                self._start(slot)
            while self._workers:
                if self._stop() and not self._stopping:
                    self._stopping = True
                    for connection in self._workers:
                        _send(connection, None)
                for connection in wait(list(self._workers), timeout=0.2):
                    self._listen(cast(Connection, connection))
        except KeyboardInterrupt:  # the second Ctrl-C: end at once; the last checkpoints remain
            for worker in self._workers.values():
                worker.process.kill()
            raise
        finally:
            for connection in self._workers:
                connection.close()  # a process that still trains takes this as the signal to stop: it saves and ends
            for worker in self._workers.values():
                worker.process.join()

    def _start(self, slot: int) -> None:
        context = multiprocessing.get_context("spawn")
        places = devices(self._setup.config)
        config = self._setup.config.model_copy(update={"device": places[slot % len(places)]})
        main = threading.current_thread() is threading.main_thread()
        old = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None  # inherited by processes from their start
        try:
            ours, theirs = context.Pipe()
            arguments = (theirs, config.model_dump_json(), self._given, self._setup.facts(), str(self._checkpoints))
            process = context.Process(target=_work, args=arguments, daemon=True, name=f"selective-compare-{slot}")
            process.start()
            theirs.close()
            self._workers[ours] = _Worker(slot, process)
        finally:
            if main:
                signal.signal(signal.SIGINT, old)

    def _listen(self, connection: Connection) -> None:
        """Take a worker's next message: that it is ready, the progress of its run, its record, or its end."""
        worker = self._workers[connection]
        try:
            message = connection.recv()
        except (EOFError, OSError):  # OSError: it died in the middle of a message
            self._ended(connection, worker)
            return
        if isinstance(message, str):  # it could not be set up, and no other could
            raise WorkerFailed(message)
        if message is None:
            worker.ready = True
            self._give(connection, worker)
        elif isinstance(message, tuple):
            worker.done = message[1]
            self._handle(Progress(worker.slot, *message))
        else:
            worker.run = None
            if not message["failed"]:  # else it ends, and another takes its place
                self._give(connection, worker)
            self._handle(message)

    def _give(self, connection: Connection, worker: _Worker) -> None:
        """Send the worker its next run, or None if there is none."""
        if self._stopping:
            return  # it has been told
        if not self._waiting:
            _send(connection, None)
            return
        worker.run, worker.done = self._waiting.pop(0), 0
        _send(connection, self._place[worker.run.key])

    def _ended(self, connection: Connection, worker: _Worker) -> None:
        """Record what a process that has ended was working on as failed, and start another if runs are left."""
        worker.process.join()
        del self._workers[connection]
        connection.close()
        reason = f"its process {_how_ended(worker.process.exitcode)}"
        if worker.run is not None:
            self._handle(failed(worker.run, reason, worker.done))
        if not self._waiting or self._stopping:
            return
        if worker.ready:
            self._start(worker.slot)
        elif not self._workers:
            raise WorkerFailed(
                f"no worker could be started: {worker.process.name} {_how_ended(worker.process.exitcode)}. A script "
                'that calls compare() with several workers needs `if __name__ == "__main__":` around the call. What '
                "was finished is kept; go on with --resume"
            )


def _how_ended(code: int) -> str:
    """Say in words how a process with this exit code ended."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = ", most often for lack of memory: fewer workers need less" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"


def _send(connection: Connection, message: Any) -> None:
    try:
        connection.send(message)
    except (BrokenPipeError, ConnectionResetError):
        return  # the process has ended, which the next message to be received says


def _work(connection: Connection, config_json: str, given: Given, facts: dict[str, Any], checkpoints: str) -> None:
    """The main function of a worker: receives indices into `runs(config)`, sends progress and records, ends at None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        setup = prepare(build(json.loads(config_json)), given)
        torch.set_num_threads(setup.config.threads)
        if setup.facts() != facts:
            raise RuntimeError(f"the data of {name_of(setup.task)} has changed since the comparison started")
        all_runs = runs(setup.config)
    except Exception:  # the user's own modules may raise anything; the parent gets the traceback as a WorkerFailed
        _send(connection, f"a worker could not set the comparison up:\n{traceback.format_exc()}")
        return
    _send(connection, None)
    try:
        while (index := connection.recv()) is not None:
            run = all_runs[index]
            path = Path(checkpoints) / f"{run.key}.pt"
            # Anything that arrives during a run means stop, and so does the closing of the other end.
            record = attempt(setup, run, path, connection.poll, lambda told: _send(connection, told))
            _send(connection, record)
            if record["failed"]:
                return  # with what the failure left behind: memory, or a device that takes no more calls
    except EOFError:
        return  # the parent process is gone, and the run is saved
