"""Times steps as training takes them: many in a row without synchronising, and the host's part of single ones."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from selective.bench.clock import CudaClock, HostClock, take_in_a_row
from selective.bench.workload import Stepping, Workload

IN_A_ROW = (
    40,
    20,
    10,
)  # steps, all multiples of the rows' periods: the most that fit in so many seconds, or the fewest
ENOUGH_SECONDS = 1.2
HOST_STEPS = 40  # for the median of the host's time in one round ...
HOST_SECONDS, FEWEST_HOST_STEPS = 0.4, 5  # ... or as many as fit in so many seconds, but not fewer


class AlternatingGradients(Stepping):
    """An optimizer whose every step finds its gradients in other tensors than the step before.

    After `zero_grad()`, backward makes new tensors, of which an optimizer can't know that they lie where the last ones
    did. Setting them is part of the time of steps in a row; torch's fused step has it, too.
    """

    def __init__(self, optimizer: Optimizer, workload: Workload, others: Sequence[Tensor]) -> None:
        super().__init__(optimizer, workload)
        self.sets = [workload.grads, others]

    def prepare(self) -> None:
        self.sets.reverse()
        for p, g in zip(self.workload.params, self.sets[0], strict=True):
            p.grad = g


def wall_seconds(clock: HostClock, stepping: Stepping, count: int) -> float:
    """Seconds for each of `count` steps in a row. The device is waited for before the first and after the last one."""
    stepping.prepare()
    clock.synchronize()
    begun = time.perf_counter()
    take_in_a_row(stepping, count)
    clock.synchronize()
    return (time.perf_counter() - begun) / count


def in_a_row(seconds: float) -> int:
    """The number of steps in a row that are timed together, of a step that takes so many seconds."""
    return next((count for count in IN_A_ROW if count * seconds <= ENOUGH_SECONDS), IN_A_ROW[-1])


def host_seconds(clock: HostClock, stepping: Stepping) -> float | None:
    """The median seconds until `step()` returns, of steps before each of which the device is idle. None on a CPU."""
    if not isinstance(clock, CudaClock):
        return None
    samples: list[float] = []
    end = time.perf_counter() + HOST_SECONDS
    while len(samples) < HOST_STEPS and (len(samples) < FEWEST_HOST_STEPS or time.perf_counter() < end):
        stepping.prepare()
        clock.synchronize()
        begun = time.perf_counter()
        stepping.step()
        samples.append(time.perf_counter() - begun)
    clock.synchronize()
    return statistics.median(samples)
