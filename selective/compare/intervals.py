"""Means with intervals over seeds, and the step at which a curve reaches a loss, in plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean over `n` values and the half-width of its 95 % interval, which is None if n is 1."""

    mean: float
    half: float | None
    n: int

    @property
    def sign(self) -> int:
        """-1 or 1 if the whole interval lies on that side of 0, else 0."""
        if self.half is None or abs(self.mean) <= self.half:
            return 0
        return -1 if self.mean < 0 else 1

    def __str__(self) -> str:
        return f"{self.mean:.4f}" if self.half is None else f"{self.mean:.4f} ± {self.half:.4f}"

    def signed(self) -> str:
        return f"{'+' if self.mean >= 0 else ''}{self}"


def t_interval(values: Sequence[float]) -> Interval:
    """Student's interval of the mean: s/sqrt(n) times the 97.5 % quantile for n - 1 degrees of freedom.

    It takes the values as independent draws from a normal distribution. One value has no interval.
    """
    n = len(values)
    if n == 0:
        raise ValueError("t_interval: no values; an interval needs two, a mean one")
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return Interval(mean, t_quantile(0.975, n - 1) * deviation / math.sqrt(n), n)


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile (probability >= 1/2) of Student's t for a whole number of degrees of freedom, by bisection."""
    low, high = 0.0, 1.0
    while t_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(80):  # halves an interval of doubles until nothing is left of it
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, degrees) < probability else (low, middle)
    return high


def t_cdf(t: float, degrees: int) -> float:
    """P(T <= t) for t >= 0; the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan2(t, math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    term = cosine if degrees % 2 else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(3 if degrees % 2 else 2, degrees - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    within = (2 / math.pi) * (angle + sine * total) if degrees % 2 else sine * total
    return (1 + within) / 2


def steps_to(target: float, steps: Sequence[float], losses: Sequence[float]) -> float | None:
    """The first step at which the curve, straight between its points, is at or below `target`; None if never."""
    for index, (step, loss) in enumerate(zip(steps, losses, strict=True)):
        if loss <= target:
            if index == 0:
                return float(step)
            before, above = steps[index - 1], losses[index - 1]
            return before + (step - before) * (above - target) / (above - loss)
    return None
