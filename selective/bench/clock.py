"""Clocks, which measure the time, memory and launches of a step, on a CPU and on a CUDA device."""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from selective.bench.workload import Stepping

COPY_ELEMENTS = {"cpu": 2**26, "cuda": 2**28}  # float32: far more than any cache
HOST_SAMPLES = 5


class HostClock:
    """Measures steps on a CPU, where `step()` returns when it is done."""

    most_steps = 1  # in one timing: a second step in a row would find data in a large cache, unlike in training

    def seconds(self, stepping: Stepping, count: int) -> float:
        """Seconds for each of `count` steps, without the time of `prepare()`."""
        taken = 0.0
        for _ in range(count):
            stepping.prepare()
            begun = time.perf_counter()
            stepping.step()
            taken += time.perf_counter() - begun
        return taken / count

    def host_seconds(self, stepping: Stepping) -> float | None:
        """Seconds for which a step keeps the host; None on a CPU, where that is the whole step."""
        return None

    def graphs_of_all(self) -> AbstractContextManager[object]:
        """Return a context in which each step records a CUDA graph if it can, however many optimizers there are.

        A process may record a few. A benchmark has dozens of optimizers in one, each in place of a user's only one.
        """
        return nullcontext()

    def extra_bytes(self, stepping: Stepping, steps: int = 1) -> int:
        """The most bytes that one of so many steps held at a time beyond those from before, by torch's allocator."""
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes two lines to the terminal each time
        stepping.prepare()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
            take_in_a_row(stepping, steps)
        results: Any = recorded.profiler.kineto_results if recorded.profiler is not None else None  # not typed by torch
        recorded_events = results.events() if results else []
        events = sorted((e.start_ns(), e.nbytes()) for e in recorded_events if e.name() == "[memory]")
        held = most = 0
        for _, size in events:
            held += size
            most = max(most, held)
        return most

    def held_bytes(self) -> int | None:
        """The bytes that tensors hold now; None on a CPU, where that is not known."""
        return None

    def launches(self, stepping: Stepping) -> dict[str, int] | None:
        """The numbers of kernels, copies and fills that a step puts on the device; None if they are not known."""
        return None

    def trace(self, stepping: Stepping, steps: int = 1) -> dict[str, Any] | None:
        """The device's work in so many steps, as a Chrome trace of the profiler; None if that is not known."""
        return None

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""

    def settle(self) -> None:
        """Free the memory of the last contender."""
        gc.collect()

    def copy_seconds(self, copy: Callable[[], object]) -> float:
        """Seconds that one call takes."""
        begun = time.perf_counter()
        copy()
        return time.perf_counter() - begun


class CudaClock(HostClock):
    """Measures steps on the current CUDA device, by the device's own events."""

    most_steps = 20
    _profiler_is_up = False

    def _between_events(self, work: Callable[[], object]) -> float:
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begun.record()
        work()
        ended.record()
        ended.synchronize()
        return begun.elapsed_time(ended) / 1e3

    def seconds(self, stepping: Stepping, count: int) -> float:
        """Seconds for each of `count` steps in a row: the device's or the host's, whichever is slower."""

        def steps() -> None:
            for _ in range(count):
                stepping.prepare()
                stepping.step()

        return self._between_events(steps) / count

    def host_seconds(self, stepping: Stepping) -> float | None:
        """The median time until `step()` returns. The device is idle before, and is not waited for."""
        samples = []
        for _ in range(HOST_SAMPLES):
            stepping.prepare()
            torch.cuda.synchronize()
            begun = time.perf_counter()
            stepping.step()
            samples.append(time.perf_counter() - begun)
        torch.cuda.synchronize()
        return statistics.median(samples)

    def extra_bytes(self, stepping: Stepping, steps: int = 1) -> int:
        stepping.prepare()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        take_in_a_row(stepping, steps)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def graphs_of_all(self) -> AbstractContextManager[object]:
        try:
            graphs = import_module("selective.kernels.gpu.graphs")
        except ImportError:  # without Triton there are none
            return nullcontext()
        return graphs.BUDGET.unlimited()

    def held_bytes(self) -> int | None:
        """With what CUDA graphs of steps keep reserved, which torch does not count as allocated."""
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() + _bytes_of_graphs()

    def launches(self, stepping: Stepping) -> dict[str, int] | None:
        """The profiler's counts; None if the profiler is not available (no CUPTI, no permission)."""
        trace = self.trace(stepping)
        return None if trace is None else count_launches(trace)

    def trace(self, stepping: Stepping, steps: int = 1) -> dict[str, Any] | None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        trace: dict[str, Any] | None = None
        for _ in range(1 if self._profiler_is_up else 2):  # at first, the profiler itself starts up while the step runs
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the profiler warns if it is not available
                    trace = self._profiled(stepping, steps)
            except (RuntimeError, OSError, ValueError, AssertionError):
                return None
        self._profiler_is_up = True
        return trace

    def _profiled(self, stepping: Stepping, steps: int) -> dict[str, Any]:
        stepping.prepare()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as recorded:
            take_in_a_row(stepping, steps)
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "trace.json")
            recorded.export_chrome_trace(str(file))
            return json.loads(file.read_text(errors="replace"))

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def settle(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def copy_seconds(self, copy: Callable[[], object]) -> float:
        return self._between_events(copy)


def take_in_a_row(stepping: Stepping, steps: int) -> None:
    """Take steps, of which the first one is prepared already."""
    for number in range(steps):
        if number:
            stepping.prepare()
        stepping.step()


def count_launches(trace: dict[str, Any]) -> dict[str, int] | None:
    """Count kernels, copies and fills in a Chrome trace of the profiler. None if it has no kernel."""
    kinds = Counter(event.get("cat") for event in trace.get("traceEvents", []))
    if not kinds["kernel"]:
        return None
    return {"kernels": kinds["kernel"], "copies": kinds["gpu_memcpy"], "fills": kinds["gpu_memset"]}


def device_seconds(trace: dict[str, Any]) -> float:
    """The sum of the times of kernels, copies and fills in a Chrome trace of the profiler."""
    on_device = ("kernel", "gpu_memcpy", "gpu_memset")
    return sum(event.get("dur", 0) for event in trace.get("traceEvents", []) if event.get("cat") in on_device) / 1e6


def clock_of(device: str) -> HostClock:
    return CudaClock() if device == "cuda" else HostClock()


def copy_bandwidth(device: str, elements: int | None = None) -> float:
    """The bytes per second that a large `copy_` on the device reads and writes (median of ten)."""
    clock = clock_of(device)
    source = torch.ones(elements or COPY_ELEMENTS[device], device=device)
    target = torch.empty_like(source)
    in_a_row = 1 if device == "cpu" else 8  # a launch takes about 1 % of one copy

    def copies() -> None:
        for _ in range(in_a_row):
            target.copy_(source)

    times = [clock.copy_seconds(copies) for _ in range(12)][2:]
    return in_a_row * 2 * source.nbytes / statistics.median(times)


def _bytes_of_graphs() -> int:
    graphs = sys.modules.get("selective.kernels.gpu.graphs")  # imported where Triton steps
    return 0 if graphs is None else graphs.BUDGET.nbytes()
