"""Time steps on a GPU under several choices of the kernels' constants, beside torch's fused AdamW.

    python scripts/kernel_times.py top_k      # exact top-K of bfloat16 parameters
    python scripts/kernel_times.py norm       # exact top-K, and the norm of the update preserved
    python scripts/kernel_times.py control    # the matched random control of MGUP, and MGUP itself, on smaller tensors

A line for each choice: milliseconds of a step, and its ratio to torch's fused step. A step is the median of `--rounds`
loops of ten steps, on the device's clock; torch's is timed in each round. Then the kernels of one step of the first
choice, which is the constants as they are, and of the best one. A constant is set before an optimizer is made, so that
all of it goes through the same tables and graphs as in training.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from selective import MGUP, NormPreserving, Policy, RandomMask, SelectiveUpdate, TopK
from selective.bench.contenders import ADAMW
from selective.bench.shapes import SHAPES
from selective.bench.workload import Workload
from selective.kernels.gpu import batch, configure, control, launch

Choice = dict[str, Any]  # values of constants, by "module.NAME"
MODULES: dict[str, Any] = {"batch": batch, "configure": configure, "control": control, "launch": launch}
STEPS = 10  # in a row


@dataclass(frozen=True)
class Sweep:
    """Some choices for one step. The policies are timed with each of them."""

    policies: dict[str, Policy]
    dtype: torch.dtype
    shapes: str
    choices: list[Choice]


def _products(**values: tuple[Any, ...]) -> list[Choice]:
    """All combinations, by constants whose dots are written as two underscores."""
    names = [name.replace("__", ".") for name in values]
    return [dict(zip(names, combination, strict=True)) for combination in itertools.product(*values.values())]


SWEEPS = {
    "top_k": Sweep(
        {"MGUP": MGUP()}, torch.bfloat16, "llama-1b",
        [
            *_products(launch__PENDING_REGISTERS=(None, 96, 80, 72, 64)),
            *_products(configure__BLOCK_OF_16_BITS=(2048,), launch__PENDING_WARPS=(8,),
                       launch__PENDING_REGISTERS=(None, 80, 64)),
            *_products(configure__BLOCK_OF_16_BITS=(2048,), launch__PENDING_WARPS=(4,),
                       launch__PENDING_REGISTERS=(None, 128)),
            *_products(batch__COUNT_BLOCK=(1024, 2048, 4096), launch__COUNT_WARPS=(4, 8),
                       launch__COUNT_REGISTERS=(None, 64)),
            *_products(configure__ONE_IN=(32, 64, 128), configure__MOST_SAMPLES=(65_536, 131_072, 262_144)),
        ],
    ),
    "norm": Sweep(
        {"TopK × NormPreserving": Policy(selection=TopK(), strength=NormPreserving())}, torch.float32, "llama-1b",
        _products(launch__RANK_AND_MOVE_REGISTERS=(72, 80, 96, 64, None), launch__MOVED_REGISTERS=(None, 64, 56)),
    ),
    "control": Sweep(
        {"MGUP": MGUP(), "control of MGUP": RandomMask.matching(MGUP())}, torch.float32, "llama-110m",
        [
            *_products(control__LOOK_REGISTERS=(64, 80, 96, None)),
            *_products(control__RANK_AND_DRAW=(False,), control__LOOK_REGISTERS=(72, None),
                       control__LOOK_BLOCK=(1024, 2048)),
        ],
    ),
}  # fmt: skip


@contextmanager
def constants(choice: Choice) -> Iterator[None]:
    """Set these constants, and set them back."""
    places = [(MODULES[name.partition(".")[0]], name.partition(".")[2], value) for name, value in choice.items()]
    before = [getattr(module, name) for module, name, _ in places]
    for module, name, value in places:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(places, before, strict=True):
            setattr(module, name, value)


def milliseconds(optimizer: torch.optim.Optimizer) -> float:
    """The device's time of one step, of STEPS in a row."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(STEPS):
        optimizer.step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / STEPS


def kernels_of(optimizer: torch.optim.Optimizer) -> list[str]:
    """The kernels of one step with their microseconds, the longest first."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        optimizer.step()
        torch.cuda.synchronize()
    events = sorted(profiled.key_averages(), key=lambda event: -event.device_time_total)
    return [f"{event.key[:60]}: {event.device_time_total:.0f} µs in {event.count}" for event in events[:12]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sweep", choices=list(SWEEPS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--first", action="store_true", help="only the constants as they are")
    options = parser.parse_args()
    sweep = SWEEPS[options.sweep]
    workload = Workload(SHAPES[sweep.shapes], "cuda", sweep.dtype)
    fused = torch.optim.AdamW(workload.params, fused=True, **ADAMW)
    fused.step()
    print(f"{torch.cuda.get_device_name()}, {sweep.shapes}, {sweep.dtype}", flush=True)
    lines: list[tuple[float, str, list[str]]] = []
    for choice in [{}] if options.first else [{}, *sweep.choices]:
        for name, policy in sweep.policies.items():
            with constants(choice):
                ours = SelectiveUpdate(
                    torch.optim.AdamW(workload.params, fused=True, **ADAMW), policy=policy, statistics=False
                )
                for _ in range(4):  # compiled, and recorded in a graph
                    workload.fresh_gradients()
                    ours.step()
                times = [(milliseconds(ours), milliseconds(fused)) for _ in range(options.rounds)]
                ratio, step = median(a / b for a, b in times), median(a for a, _ in times)
                told = ", ".join(f"{key}={value}" for key, value in choice.items()) or "as they are"
                lines.append((ratio, f"{name}: {step:.3f} ms, {ratio:.3f} × fused, {told}", kernels_of(ours)))
            print(lines[-1][1], flush=True)
            del ours
            torch.cuda.empty_cache()
    for _, text, kernels in (*lines[: len(sweep.policies)], min(lines)):
        print(f"\n{text}", *kernels, sep="\n  ")


if __name__ == "__main__":
    main()
