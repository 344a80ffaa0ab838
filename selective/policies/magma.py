"""Magma and SkipUpdate: policies that flip a coin for each tensor (arXiv 2602.15322)."""

from __future__ import annotations

from pydantic import Field

from selective.policies.policy import Policy
from selective.policies.selections import Bernoulli, Selection
from selective.policies.strengths import Alignment, Fixed, Strength


class Magma(Policy):
    """Flip a coin for each tensor. Step the kept ones × s, s = 0.9 s + 0.1 sigmoid(cos(m, g) / 2), and no others.

    Source: arXiv 2602.15322, as restated by others. s starts at 1 [ours]. The mean multiplier is about a quarter:
    retune the learning rate. The paper masks attention and MLP matrices only: give Magma to those with a parameter
    group's `policy`. Moments always move densely.
    """

    probability: float = Field(default=0.5, gt=0, le=1)
    """The probability that a tensor is stepped."""
    temperature: float = Field(default=2.0, gt=0)
    """The divisor of the cosine of momentum and gradient."""
    smoothing: float = Field(default=0.9, ge=0, lt=1)
    """The share of s that stays in each step."""

    def parts(self) -> tuple[Selection, Strength]:
        strength = Alignment(temperature=self.temperature, smoothing=self.smoothing)
        return Bernoulli(probability=self.probability, unit="tensor"), strength


class SkipUpdate(Policy):
    """Flip a coin for each tensor. Step the kept ones × 1/probability, and no others.

    Source: arXiv 2602.15322, as restated by others (a fair coin, × 2 for kept tensors).
    """

    probability: float = Field(default=0.5, gt=0, le=1)
    """The probability that a tensor is stepped."""

    def parts(self) -> tuple[Selection, Strength]:
        return Bernoulli(probability=self.probability, unit="tensor"), Fixed(selected=1.0 / self.probability, rest=0.0)
