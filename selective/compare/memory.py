"""Measures the bytes that an optimizer keeps, and those that it needs during a step, from the allocator's events."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import profile

from selective.base.generators import generators_restored
from selective.compare.config import ConfigError
from selective.compare.contenders import Run, contenders, make
from selective.compare.setup import Setup
from selective.compare.task import start_of

HOW = (
    "Of a fresh model with random gradients. state_bytes: all tensors in optimizer.state after two steps. peak_bytes: "
    "the most that was allocated at one time from the optimizer's construction through its second step, by the events "
    "of torch.profiler. Extra state is state_bytes beyond the base's; extra in a step is what peak_bytes exceeds the "
    "base's by, less the extra state."
)


def measure(setup: Setup) -> list[dict[str, Any]]:
    """`state_bytes`, `peak_bytes` and their excess over the base's, for each contender in order; None if unknown.

    It builds and steps every contender, so that one that can't be built fails here, before any run. Each gets a thread
    of its own: the kernels keep small buffers for each thread, and the first contender would pay for all. Unknown are
    the bytes of a contender for which the memory is not enough, and all excess if that is the base.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes two lines to the terminal each time
    with profile():
        pass  # if its first use is in another thread, it complains on the terminal
    measured: list[dict[str, Any]] = []
    with generators_restored():
        for contender in contenders(setup.config):
            with ThreadPoolExecutor(max_workers=1) as fresh:
                run = Run(contender, contender.rates[0], 0, contender.pairs[0][1])
                measured.append(fresh.submit(_measure, setup, run).result())
    if torch.device(setup.config.device).type == "cuda":
        torch.cuda.empty_cache()  # the memory is for the runs, which may be in other processes
    base = measured[0]
    for entry in measured:
        unknown = None in (*entry.values(), *base.values())
        state = None if unknown else entry["state_bytes"] - base["state_bytes"]
        entry["extra_state_bytes"] = state
        entry["extra_step_bytes"] = None if state is None else entry["peak_bytes"] - base["peak_bytes"] - state
    return measured


def _measure(setup: Setup, run: Run) -> dict[str, Any]:
    try:
        return _bytes(setup, run)
    except ConfigError:
        raise
    except torch.OutOfMemoryError:
        return {"state_bytes": None, "peak_bytes": None}  # its runs will say so, and others can go on
    except Exception as error:  # an optimizer, a policy or a model of the user's may raise anything
        label = run.contender.label
        raise ConfigError(f"{label} can't be built and stepped: {type(error).__name__}: {error}") from error


def _bytes(setup: Setup, run: Run) -> dict[str, Any]:
    device = setup.config.device
    model = start_of(setup.task, run.seed).to(device)
    generator = torch.Generator().manual_seed(run.seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(device, parameter.dtype)
    kind = torch.device(device).type
    # The profiler below torch.profiler's, which makes an object of every event: most of the time that this takes.
    profiler = profile(use_device=kind if kind == "cuda" else None, use_kineto=True, profile_memory=True)
    with profiler:
        torch.empty(1, device=device)  # one event for sure: a plain SGD allocates nothing
        optimizer = make(setup, run, model)
        optimizer.step()
        optimizer.step()
    state = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(optimizer.state))
    return {"state_bytes": state, "peak_bytes": _peak(profiler, kind)}


def _tensors(state: Any) -> Iterator[Tensor]:
    for key in state:
        for value in state[key].values():
            if isinstance(value, Tensor):
                yield value


def _peak(profiler: profile, device: str) -> int:
    """The most bytes alive at one time on the device. The trace is the only public form that lists each event."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    kind = {"cpu": 0, "cuda": 1}.get(device, 0)  # torch's DeviceType
    events = [e for e in trace if e.get("name") == "[memory]" and e["args"]["Device Type"] == kind]
    if not events:
        raise RuntimeError(
            "torch.profiler reported no memory events, so that the bytes of a step cannot be measured; "
            f"torch {torch.__version__} may write its traces in another form"
        )
    alive = most = 0
    for event in sorted(events, key=lambda e: (e["ts"], e["args"].get("Ev Idx", 0))):
        alive += event["args"]["Bytes"]
        most = max(most, alive)
    return most
