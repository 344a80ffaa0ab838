"""Check, warm up, then time in interleaved rounds."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from selective.bench.contenders import Contender, standard_contenders
from selective.bench.shapes import SHAPES, Shape
from selective.kernels import use_backend

CHECKED = [(), (1,), (63,), (37, 61), (3, 5, 3, 3), (300_007,)]  # the last is several chunks, and has a bracket
CHECK_STEPS = 3
# Two ways to round one update differ by some eps of it; a product or a score on the border may then fall to the other
# side, which moves that coordinate by a whole update. More than this share of them is another rule.
ON_THE_BORDER = 1e-4


class Mismatch(RuntimeError):
    """A contender's result is not what its reference says."""


@dataclass
class Measurement:
    """What one contender took. Times in seconds, one for each round; ratios are medians of the rounds' own ratios."""

    name: str
    seconds: list[float] = field(default_factory=list)
    extra_bytes: int = 0  # the most that a step allocated at one time, after warming up
    versus_foreach: float | None = None
    versus_fused: float | None = None
    refused: str | None = None  # why there is no time

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def parameters(shapes: Sequence[Shape], device: str = "cpu", seed: int = 0) -> list[Parameter]:
    """Random float32 parameters with gradients."""
    generator = torch.Generator().manual_seed(seed)
    made = [Parameter((0.02 * torch.randn(shape, generator=generator)).to(device)) for shape in shapes]
    for p in made:
        p.grad = torch.randn(p.shape, generator=generator).to(device)
    return made


def check(contender: Contender, device: str = "cpu") -> None:
    """Three steps from the same start by the contender and by its reference.

    Raises:
        Mismatch: with the parameter's shape and how much of it differs.
    """
    ours, theirs = parameters(CHECKED, device), parameters(CHECKED, device)
    mine = contender.make_optimizer(ours)
    reference = (contender.make_reference or contender.make_optimizer)(theirs)
    for _ in range(CHECK_STEPS):
        mine.step()
        with use_backend("auto" if contender.make_reference else "reference"):
            reference.step()
    eps = torch.finfo(torch.float32).eps
    for a, b in zip(ours, theirs, strict=True):
        size = torch.maximum(a.detach().abs(), b.detach().abs()) + 4e-3  # parameter, and updates of lr × 2 a step
        apart = int(((a - b).detach().abs() > 16 * CHECK_STEPS * eps * size).sum())
        if apart > ON_THE_BORDER * a.numel() or not bool(torch.isfinite(a).all()):
            raise Mismatch(
                f"{contender.name}: {apart} of {a.numel()} elements of a parameter of shape {tuple(a.shape)} differ "
                f"from the reference after {CHECK_STEPS} steps; a time would be that of another step"
            )


def extra_bytes(optimizer: Optimizer) -> int:
    """The most memory that one step held beyond what was there before it (by torch's CPU allocator)."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes two lines to the terminal each time
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        optimizer.step()
    results: Any = recorded.profiler.kineto_results if recorded.profiler is not None else None  # not typed by torch
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]") if results else []
    held = most = 0
    for _, size in events:
        held += size
        most = max(most, held)
    return most


def _ratio(of: Measurement, to: Measurement | None) -> float | None:
    if to is None or not of.seconds or not to.seconds:
        return None
    return statistics.median(a / b for a, b in zip(of.seconds, to.seconds, strict=True))


def run(
    shapes: str = "transformer-30m",
    contenders: Sequence[Contender] | None = None,
    *,
    rounds: int = 7,
    warm_up: int = 2,
    tell: Callable[[str], None] | None = None,
) -> list[Measurement]:
    """Time `step()` of each contender on one set of shapes, on the CPU.

    All contenders step the same parameters with the same gradients; each has its own state (two tensors a parameter
    for AdamW), so that all of them together need that much memory.

    Args:
        shapes: a key of `SHAPES`.
        contenders: those to time; None for `standard_contenders()`. The ratios need "torch foreach", "torch fused".
        rounds: in each, every contender steps once; medians are over rounds.
        warm_up: steps before, not timed (state and buffers are made there).
        tell: called with a line of text as things go on, which takes a minute on the larger shapes.

    Returns:
        One measurement each, in order. A contender that does not match its reference has no times, but a reason.
    """
    if shapes not in SHAPES:
        raise ValueError(f"shapes is {shapes!r}, must be one of {', '.join(SHAPES)}")
    chosen = standard_contenders() if contenders is None else list(contenders)
    params = parameters(SHAPES[shapes])
    measured = [Measurement(c.name) for c in chosen]
    running: list[tuple[Optimizer, Measurement]] = []
    for number, (contender, measurement) in enumerate(zip(chosen, measured, strict=True), 1):
        if tell is not None:
            tell(f"{number}/{len(chosen)} {contender.name}: checked against its reference, warmed up")
        try:
            check(contender)
        except Mismatch as wrong:
            measurement.refused = str(wrong)
            continue
        optimizer = contender.make_optimizer(params)
        for _ in range(warm_up):
            optimizer.step()
        measurement.extra_bytes = extra_bytes(optimizer)
        running.append((optimizer, measurement))
    if tell is not None:
        tell(f"timing {rounds} round(s)")
    for _ in range(rounds):
        for optimizer, measurement in running:
            begun = time.perf_counter()
            optimizer.step()
            measurement.seconds.append(time.perf_counter() - begun)
    by_name = {m.name: m for m in measured}
    for measurement in measured:
        measurement.versus_foreach = _ratio(measurement, by_name.get("torch foreach"))
        measurement.versus_fused = _ratio(measurement, by_name.get("torch fused"))
    return measured
