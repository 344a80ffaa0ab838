"""Checks each contender, warms it up, and times it in rounds beside torch's fused step."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from selective.bench.check import Mismatch, check
from selective.bench.clock import HostClock, clock_of, copy_bandwidth
from selective.bench.contenders import Contender, NotPossible, adamw, standard_contenders
from selective.bench.promised import Promise, promised_bytes
from selective.bench.shapes import SHAPES
from selective.bench.workload import Stepping, Workload

ENOUGH_SECONDS = 0.06  # the length of a timing, which has as many steps as fit, up to the clock's `most_steps`
Outcome = Literal["timed", "mismatch", "missing", "out of memory", "failed", "not possible", "no time left"]


@dataclass
class Measurement:
    """The measurements of one contender. Times are seconds per step, by round; the ratio is the median over rounds."""

    name: str
    promise: Promise
    elements: int
    bandwidth: float
    outcome: Outcome = "timed"
    refused: str | None = None  # the reason why there is no time
    seconds: list[float] = field(default_factory=list)
    fused_seconds: list[float] = field(default_factory=list)  # torch's fused step, in the same rounds
    host_seconds: float | None = None
    extra_bytes: int | None = None  # the most bytes that a step held at one time, after warming up
    kept_bytes: int | None = None  # the bytes that it holds between steps beyond those of torch's fused AdamW
    launches: dict[str, int] | None = None
    versus_fused: float | None = None
    versus_foreach: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def floor_seconds(self) -> float:
        """The time of its promised bytes at the bandwidth of a copy."""
        return self.promise.floor * self.elements / self.bandwidth

    @property
    def bytes_per_second(self) -> float:
        """Promised bytes over the time taken."""
        return self.promise.floor * self.elements / self.median


@dataclass
class Result:
    """All contenders on one set of shapes."""

    shapes: str
    device: str
    dtype: torch.dtype
    tensors: int
    elements: int
    rounds: int
    bandwidth: float  # bytes per second that a large copy reads and writes
    measurements: list[Measurement] = field(default_factory=list)
    interrupted: bool = False  # some contenders are missing

    @property
    def floor_seconds(self) -> float:
        """The time of AdamW's promised bytes at the bandwidth of a copy."""
        return promised_bytes(dtype=self.dtype).floor * self.elements / self.bandwidth


def run(
    shapes: str = "transformer-30m",
    contenders: Sequence[Contender] | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    rounds: int = 7,
    warm_up: int = 3,
    tell: Callable[[str], None] | None = None,
) -> Result:
    """Time `step()` of each contender on one set of shapes.

    All contenders step the same parameters with the same gradients, which are new in each round. At any time only the
    contender's state and that of a baseline, torch's fused AdamW, exist. In each round both are timed, one right after
    the other, and the order alternates. "torch fused" itself is timed against a second instance: the distance of its
    ratio from 1 shows how well the benchmark can tell two steps apart.

    Args:
        shapes: a key of `SHAPES`.
        contenders: the contenders to time; None for `standard_contenders(...)`. `versus_foreach` needs "torch foreach".
        device: "cpu" or "cuda" (the current device).
        dtype: the dtype of parameters, gradients and state.
        rounds: the number of rounds, over which medians are taken.
        warm_up: the number of steps before the first timing, in which state is made and kernels are compiled.
        tell: is called with a line of text now and then, because the larger shapes take minutes.

    Returns:
        A measurement for each contender, in order. One that fails, does not fit, is not installed, or does not match
        its reference has a reason instead of times. After Ctrl-C, the measurements that were done by then.
    """
    if shapes not in SHAPES:
        raise ValueError(f"shapes is {shapes!r}, must be one of {', '.join(SHAPES)}")
    chosen = standard_contenders(device, dtype) if contenders is None else list(contenders)
    clock = clock_of(device)
    bandwidth = copy_bandwidth(device)
    clock.settle()
    workload = Workload(SHAPES[shapes], device, dtype)
    result = Result(shapes, device, dtype, len(workload.params), workload.elements, rounds, bandwidth)
    rig = Rig(clock, workload, rounds, warm_up)
    for number, contender in enumerate(chosen, 1):
        if tell is not None:
            tell(f"{shapes} {number}/{len(chosen)} {contender.name}")
        measurement = Measurement(contender.name, contender.promise(dtype), workload.elements, bandwidth)
        try:
            _measure(contender, measurement, rig)
        except KeyboardInterrupt:
            result.interrupted = True
            break
        result.measurements.append(measurement)
    foreach = next((m.versus_fused for m in result.measurements if m.name == "torch foreach"), None)
    for measurement in result.measurements:
        if foreach and measurement.versus_fused:
            measurement.versus_foreach = measurement.versus_fused / foreach
    return result


class Rig:
    """The parts that all contenders share: parameters, gradients, and torch's fused AdamW over them."""

    def __init__(self, clock: HostClock, workload: Workload, rounds: int, warm_up: int) -> None:
        self.clock, self.workload, self.rounds, self.warm_up = clock, workload, rounds, warm_up
        self.baseline, self.baseline_bytes = self.warmed(Contender("torch fused", adamw(fused=True)))
        self.baseline_count = self.count(self.baseline)

    def warmed(self, contender: Contender) -> tuple[Stepping, int | None]:
        """The contender's optimizer after a few steps, and the bytes that it holds."""
        before = self.clock.held_bytes()
        stepping = Stepping(contender.make_optimizer(self.workload.params), self.workload)
        stepping.warm_up(self.warm_up)
        after = self.clock.held_bytes()
        return stepping, None if before is None or after is None else after - before

    def count(self, stepping: Stepping) -> int:
        """The number of steps of one timing."""
        return max(1, min(self.clock.most_steps, int(ENOUGH_SECONDS / self.clock.seconds(stepping, 1))))


def _measure(contender: Contender, measurement: Measurement, rig: Rig) -> None:
    """Fill in the measurement. Any error becomes this contender's reason, and does not end the run."""
    if contender.missing is not None:
        measurement.outcome, measurement.refused = "missing", contender.missing
        return
    try:
        check(contender, rig.workload.params[0].device.type, rig.workload.params[0].dtype)
        rig.clock.settle()
        rig.workload.refill()
        _time(contender, measurement, rig)
    except Exception as wrong:  # other people's optimizers may raise anything
        measurement.outcome, measurement.refused = outcome_of(wrong, contender)
    if measurement.refused is not None:
        measurement.seconds, measurement.fused_seconds = [], []
    rig.workload.hand_out()
    rig.clock.settle()


def outcome_of(wrong: Exception, contender: Contender) -> tuple[Outcome, str]:
    """The outcome of a contender that raised an error, and the reason in words."""
    if isinstance(wrong, (Mismatch, NotPossible)):
        return "mismatch" if isinstance(wrong, Mismatch) else "not possible", str(wrong)
    if isinstance(wrong, torch.OutOfMemoryError):
        return "out of memory", str(wrong).split(". ")[0]
    missing = isinstance(wrong, ImportError) and contender.agrees != "same"  # a package that the peer itself needs
    return "missing" if missing else "failed", f"{type(wrong).__name__}: {wrong}"


def _time(contender: Contender, measurement: Measurement, rig: Rig) -> None:
    clock = rig.clock
    stepping, held = rig.warmed(contender)
    if held is not None and rig.baseline_bytes is not None:
        measurement.kept_bytes = held - rig.baseline_bytes
    measurement.extra_bytes = clock.extra_bytes(stepping)
    measurement.launches = clock.launches(stepping)
    measurement.host_seconds = clock.host_seconds(stepping)
    pair = [
        (rig.baseline, rig.baseline_count, measurement.fused_seconds),
        (stepping, rig.count(stepping), measurement.seconds),
    ]
    for _ in range(rig.rounds):
        rig.workload.fresh_gradients()
        for turn, count, times in pair:
            turn.workload.hand_out()
            times.append(clock.seconds(turn, count))
        pair.reverse()  # the next round begins with the other optimizer
    ratios = [a / b for a, b in zip(measurement.seconds, measurement.fused_seconds, strict=True)]
    measurement.versus_fused = statistics.median(ratios)
