"""RepeatedLaunches: the launches of a plan, recorded once in a CUDA graph, and replayed by one launch in later steps.

Python's part of a step stays as it is: checks, counting, hooks, tables. Before a replay the tables are brought up to
date as before launches. All that differs from step to step is in them: addresses, numbers, ranks, step counts, the
addresses of the clocks. What a kernel is handed otherwise is the same as long as the plan lasts: tables, numbers of
programs, compile-time constants. So a graph lasts as long as its plan, and goes with it.

Here is when launches are recorded and when they are not. `cuda_graphs.py` does the recording.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from ..graph_switch import SWITCH, switched_off

WARM = 2  # steps before, in which no launch went through Triton's dispatcher: all kernels are compiled and loaded
MOST_GRAPHS = 16  # on a device
# Memory of all graphs on a device. Launches that need more run for longer than the host takes to make them.
MOST_BYTES = 128 << 20
# Recordings that a process makes on a device, in all: torch keeps some memory of each that is gone reserved.
MOST_RECORDED = 64

Sums = list[Tensor | None]  # of each batch; None: without statistics
Launch = Callable[[], tuple[Sums, int]]  # makes all launches; returns the sums, and the bytes that they needed

# Recordings that were let go during a user's capture, which ends in an error if a graph is destroyed meanwhile.
_retired: list[object] = []


class Recording(Protocol):
    """Launches that were recorded. `nbytes` is the memory that they keep."""

    device: torch.device
    nbytes: int

    def replay(self) -> Sums:
        """Repeat the launches in the current stream. Returns sums that no later replay changes."""
        ...


class Recorder(Protocol):
    """Knows whether launches can be recorded now, and records them."""

    def is_capturing(self) -> bool:
        """True if the current stream is being captured into somebody else's graph."""
        ...

    def settings(self) -> object | None:
        """The settings that the launches of this step depend on; None if each of them has to be made by itself."""
        ...

    def dispatched(self) -> int:
        """The number of launches until now that went through Triton's dispatcher, which compiles."""
        ...

    def record(self, device: torch.device, launch: Launch, nbytes: int) -> Recording:
        """Record what `launch` does, without doing it.

        Raises a RuntimeError if that is not possible; the message says why.
        """
        ...


class Budget:
    """The recordings that exist, on all devices: their number and memory are bounded for each device."""

    def __init__(
        self, most: int = MOST_GRAPHS, most_bytes: int = MOST_BYTES, most_recorded: int = MOST_RECORDED
    ) -> None:
        self.most, self.most_bytes, self.most_recorded = most, most_bytes, most_recorded
        self._recordings: WeakSet[Recording] = WeakSet()
        self._recorded: Counter[torch.device] = Counter()  # until now

    def why_not(self, device: torch.device, nbytes: int) -> str | None:
        """The reason, in words, why no recording of this many bytes is added; None if it can be."""
        here = [recording for recording in self._recordings if recording.device == device]
        if self._recorded[device] >= self.most_recorded:
            return f"{self._recorded[device]} graphs have been recorded on {device}, as many as this process may record"
        if len(here) >= self.most:
            return f"there are {len(here)} graphs on {device} already, as many as there may be"
        return self.why_too_large(device, nbytes)

    def why_too_large(self, device: torch.device, nbytes: int) -> str | None:
        """The reason, in words, why a recording of this many bytes is too large; None if it is not."""
        taken = self.nbytes(device)
        if taken + nbytes <= self.most_bytes:
            return None
        beside = f" beside the {_mib(taken)} of other graphs" if taken else ""
        return f"a graph would keep {_mib(nbytes)}{beside}, and graphs may keep {_mib(self.most_bytes)} on a device"

    @contextmanager
    def unlimited(self) -> Iterator[None]:
        """A context in which any number of recordings of any size may be made."""
        limits = self.most, self.most_bytes, self.most_recorded
        self.most = self.most_bytes = self.most_recorded = sys.maxsize
        try:
            yield
        finally:
            self.most, self.most_bytes, self.most_recorded = limits

    def nbytes(self, device: torch.device | None = None) -> int:
        """The memory that all recordings on this device keep; None: on all of them."""
        return sum(recording.nbytes for recording in self._recordings if device in (None, recording.device))

    def __len__(self) -> int:
        return len(self._recordings)

    def recorded(self, device: torch.device) -> None:
        """Count a recording that was made."""
        self._recorded[device] += 1

    def add(self, recording: Recording) -> None:
        """Count a recording until it is let go."""
        self._recordings.add(recording)


BUDGET = Budget()
_ONE_AT_A_TIME = threading.Lock()


class RepeatedLaunches:
    """The launches of some batches on one device, which every step repeats.

    The first steps make them one by one. Then they are recorded, and from then on replayed.
    `recorder` is None where there is nothing to record with: then they are made one by one.
    """

    def __init__(
        self, launch: Launch, device: torch.device, recorder: Recorder | None, budget: Budget = BUDGET
    ) -> None:
        self.device, self._launch, self._recorder, self._budget = device, launch, recorder, budget
        self._recording: Recording | None = None
        self._settings: object | None = None  # of the last step
        self._warm = 0  # steps in a row with these settings, and without the dispatcher
        self._nbytes = 0  # that the launches of the last step needed
        self._wanted = True  # in the last step
        self._refused = f"the environment says {SWITCH}=0" if switched_off() else None

    def __call__(self, wanted: bool) -> Sums:
        """Make the launches of a step, whose tables are up to date. `wanted`: they may be recorded and replayed."""
        recorder, self._wanted = self._recorder, wanted
        if recorder is None or not wanted or self._refused is not None:
            return self._launch()[0]
        if recorder.is_capturing():
            self._give_up()
            return self._launch()[0]
        _retired.clear()
        settings = recorder.settings()
        if settings is None:
            return self._launch()[0]
        if settings != self._settings:
            self._recording, self._settings, self._warm = None, settings, 0
        if self._recording is None and self._warm >= WARM:
            self._record(recorder)
        if self._recording is not None:
            return self._recording.replay()
        dispatched = recorder.dispatched()
        sums, self._nbytes = self._launch()
        self._warm = self._warm + 1 if recorder.dispatched() == dispatched else 0
        return sums

    def _record(self, recorder: Recorder) -> None:
        with _ONE_AT_A_TIME:
            fits = self._nbytes <= self._budget.most_bytes  # else nothing that is collected could help
            if fits and self._budget.why_not(self.device, self._nbytes) is not None:
                gc.collect()  # optimizers that nobody has any more may hold graphs
                _retired.clear()
            self._refused = self._budget.why_not(self.device, self._nbytes)
            if self._refused is not None:
                return
            try:
                recording = recorder.record(self.device, self._launch, self._nbytes)
            except RuntimeError as error:
                self._refused = f"recording them failed ({str(error).strip().partition(chr(10))[0]})"
                return
            finally:
                self._budget.recorded(self.device)
            self._refused = self._budget.why_too_large(self.device, recording.nbytes)
            if self._refused is None:
                self._recording = recording
                self._budget.add(recording)

    def __del__(self) -> None:
        # A plan that goes, or a collection of garbage, may come in the middle of a user's capture.
        if self._recording is not None and self._recorder is not None and not sys.is_finalizing():
            if self._recorder.is_capturing():
                _retired.append(self._recording)

    def _give_up(self) -> None:
        """Let the recording go, because the user records this step: from then on that graph has the tables."""
        if self._recording is not None:
            _retired.append(self._recording)
        self._recording, self._settings, self._warm = None, None, 0

    def describe(self) -> str | None:
        """The way in which the launches are made, in words; None where nothing can be recorded."""
        if self._recorder is None:
            return None
        if not self._wanted:
            return "made one by one, because some of the parameters that share them have graph=False"
        if self._refused is not None:
            return f"made one by one, because {self._refused}"
        if self._recording is not None:
            return "replayed as a CUDA graph"
        return f"made one by one until {WARM} steps have compiled nothing, then replayed as a CUDA graph"


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):.0f} MiB"
