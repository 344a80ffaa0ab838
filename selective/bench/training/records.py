"""The measurements of a row, and of all rows of one model."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from selective.bench.measure import Outcome


@dataclass
class RowMeasurement:
    """The measurements of one row. Times are seconds for each step.

    seconds: of steps in a row without synchronising, by round; `fused_seconds` has torch's fused step of that round.
    host: the median time until `step()` returns, the device idle before it, by round; `fused_host` is that of torch's
        fused step. `host_with_statistics` is that of the row with statistics, in one round.
    device_seconds: the sum of the kernels', copies' and fills' times. `launches` are their numbers for each step.
    first_seconds: the first step; `warm_up_seconds` is the sum over the rest of the warming up.
    cold_seconds: the first step in a process of its own that may have had to compile kernels.
    state_bytes: the tensors in the optimizer's `state`. peak_bytes: the most that was held during a step beyond
        parameters, gradients and state. `kept_bytes` of them are held between steps.
    """

    name: str
    outcome: Outcome = "timed"
    refused: str | None = None
    captures: list[str] = field(default_factory=list)  # the ways in which updates are obtained, of our rows
    seconds: list[float] = field(default_factory=list)
    fused_seconds: list[float] = field(default_factory=list)
    steps_in_a_row: int = 0
    host: list[float] = field(default_factory=list)
    fused_host: list[float] = field(default_factory=list)
    host_with_statistics: float | None = None
    device_seconds: float | None = None
    launches: dict[str, float] | None = None
    first_seconds: float | None = None
    warm_up_seconds: float | None = None
    cold_seconds: float | None = None
    state_bytes: int | None = None
    kept_bytes: int | None = None
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def versus_fused(self) -> float | None:
        """The median over the rounds of the ratio to torch's fused step in that round."""
        return _median_ratio(self.seconds, self.fused_seconds)

    @property
    def host_seconds(self) -> float | None:
        """The median over the rounds; None on a CPU."""
        return statistics.median(self.host) if self.host else None

    @property
    def host_versus_fused(self) -> float | None:
        """The median over the rounds of the ratio to the host's time for torch's fused step in that round."""
        return _median_ratio(self.host, self.fused_host)


def _median_ratio(own: list[float], fused: list[float]) -> float | None:
    ratios = [a / b for a, b in zip(own, fused, strict=True)]
    return statistics.median(ratios) if ratios else None


@dataclass
class TrainingResult:
    """All rows of one model."""

    model: str
    device: str
    tensors: int
    elements: int
    rounds: int
    new_gradients: bool = False
    untouched: float = 0.0  # the share of an embedding's rows that has no gradient
    measurements: list[RowMeasurement] = field(default_factory=list)
    interrupted: bool = False  # rows or rounds are missing

    def named(self, name: str) -> RowMeasurement | None:
        return next((m for m in self.measurements if m.name == name and m.seconds), None)
