"""The spread of a benchmark's figures over its rounds, and a warning if it says that they mean little."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from selective.bench.measure import Measurement, Result

# In 22 runs on quiet machines (docs/measurements), CPUs and GPUs, the largest were 0.16 and 0.08.
MOST_SPREAD = (
    0.25  # the median over optimizers of the distance between those percentiles of their ratio, over its median
)
MOST_BIAS = 0.15  # the distance from 1 of the ratio of torch's fused step to itself
FEWEST_ROUNDS = 3  # below that, there are no percentiles to speak of
FUSED = "torch fused"


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile, interpolated between neighbours."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * q / 100
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (at - below) * (ordered[above] - ordered[below])


def ratios(measurement: Measurement) -> list[float]:
    """The contender's time over that of torch's fused step, by round."""
    pairs = zip(measurement.seconds, measurement.fused_seconds, strict=True)
    return [seconds / fused for seconds, fused in pairs]


def middle(values: Sequence[float]) -> tuple[float, float]:
    """The 20th and the 80th percentile."""
    return percentile(values, 20), percentile(values, 80)


def why_unreliable(result: Result) -> str | None:
    """The reason why the figures mean little, in words, with what to do; None if nothing speaks against them."""
    timed = [m for m in result.measurements if m.refused is None and len(m.seconds) >= FEWEST_ROUNDS]
    reasons = []
    spread = statistics.median(map(_spread, timed)) if timed else 0.0
    if spread > MOST_SPREAD:
        reasons.append(f"a ratio to torch's fused step typically varies by {spread:.0%} between the middle rounds")
    itself = next((m.versus_fused for m in timed if m.name == FUSED), None)
    if itself is not None and abs(itself - 1) > MOST_BIAS:
        reasons.append(f"torch's fused step took {itself:.2f} × the time of itself")
    if not reasons:
        return None
    return (
        f"warning: these figures mean little: {', and '.join(reasons)}. Something else probably runs on this machine: "
        f"stop it and measure again, with more --rounds if need be"
    )


def _spread(measurement: Measurement) -> float:
    by_round = ratios(measurement)
    low, high = middle(by_round)
    return (high - low) / percentile(by_round, 50)
