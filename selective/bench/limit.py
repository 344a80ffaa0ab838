"""Limit: treats a time limit's SIGTERM as Ctrl-C, so that the run keeps its measurements."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 128 + signal.SIGINT  # the exit code


class Limit:
    """A context in which SIGTERM raises KeyboardInterrupt, except in `uninterrupted`. Only in the main thread."""

    def __init__(self) -> None:
        self.interrupted = False
        self._writing = False

    def __enter__(self) -> Limit:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGTERM, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._before)

    def _interrupt(self, *_: object) -> None:
        self.interrupted = True
        if not self._writing:
            raise KeyboardInterrupt

    @contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """A context for writing results, which SIGTERM does not interrupt."""
        self._writing = True
        try:
            yield
        finally:
            self._writing = False


def report_interruption() -> int:
    """Print that the run was interrupted. Returns the exit code."""
    print("interrupted: the rest has not been measured")
    return INTERRUPTED
