"""Says where a step's time goes: the host's by function and by file of ours, the device's by kernel."""

from __future__ import annotations

import cProfile
import pstats
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import selective
from selective import kernels
from selective.bench.clock import HostClock, clock_of
from selective.bench.shapes import MODELS
from selective.bench.training.groups import groups_of
from selective.bench.training.measure import WARM_UP_ROTATED
from selective.bench.training.rows import Row
from selective.bench.workload import Stepping, Workload

STEPS = 40  # a multiple of every row's period
LINES = 25
OURS = [Path(str(module.__file__)).resolve().parent for module in (selective, kernels)]


def profile_text(row: Row, model: str, device: str) -> str:
    """Profile a row's warm step: Python functions by their own time, files of ours, and kernels."""
    clock = clock_of(device)
    kinds = [kind for kind, _ in MODELS[model]]
    workload = Workload([shape for _, shape in MODELS[model]], device)
    stepping = Stepping(row.contender.make_optimizer(groups_of(workload.params, kinds, row.policy_on)), workload)
    stepping.warm_up(WARM_UP_ROTATED)
    functions, files, calls = _host(clock, stepping)
    lines = [f"{row.name}, {model}: a step of {STEPS}; the profiler makes Python slower", "",
             "host, ms of its own in a step (calls): by function", *functions, "",
             f"by file of ours ({calls:,.0f} calls of Python functions in a step)", *files, ""]  # fmt: skip
    trace = clock.trace(stepping, STEPS)
    return "\n".join([*lines, "device, ms in a step (launches): by kernel", *_device(trace)])


def _host(clock: HostClock, stepping: Stepping) -> tuple[list[str], list[str], float]:
    """Lines for functions and for files, most first, and the number of calls in a step."""
    profiler = cProfile.Profile()
    for _ in range(STEPS):
        stepping.prepare()
        clock.synchronize()
        profiler.enable()
        stepping.step()
        profiler.disable()
    statistics: Any = pstats.Stats(profiler)
    by_function: Counter[str] = Counter()
    by_file: Counter[str] = Counter()
    calls: dict[str, int] = defaultdict(int)
    for (file, line, function), (_, number, own, _, _) in statistics.stats.items():
        place = _place(file)
        name = f"{place}:{line} {function}" if line else function
        by_function[name] += own
        calls[name] += number
        by_file[place or "torch, Triton and Python"] += own
        calls[place or "torch, Triton and Python"] += number
    total = sum(calls[name] for name in by_function) / STEPS
    ours = Counter({name: own for name, own in by_file.items() if name})
    return _lines(by_function, calls), _lines(ours, calls), total


def _place(file: str) -> str:
    """A file of ours by its path in the package; "" for others."""
    path = Path(file).resolve()
    for folder in OURS:
        if path.is_relative_to(folder):
            return f"{'kernels' if folder.name == 'kernels' else folder.name}/{path.relative_to(folder)}"
    return ""


def _lines(seconds: Counter[str], counts: dict[str, int]) -> list[str]:
    return [
        f"{1e3 * taken / STEPS:10.4f}  {counts[name] / STEPS:9,.1f}  {name}"
        for name, taken in seconds.most_common(LINES)
    ]


def _device(trace: dict[str, Any] | None) -> list[str]:
    """Lines for kernels, copies and fills, those that take most first."""
    if trace is None:
        return ["none"]
    seconds: Counter[str] = Counter()
    counts: dict[str, int] = defaultdict(int)
    for event in trace.get("traceEvents", []):
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            seconds[event["name"]] += event.get("dur", 0) / 1e6
            counts[event["name"]] += 1
    total = f"{1e3 * sum(seconds.values()) / STEPS:10.4f}  {sum(counts.values()) / STEPS:9,.1f}  all"
    return [total, *_lines(seconds, counts)]
