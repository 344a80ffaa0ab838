"""Cautious and Grams: policies for coordinates where the step and the gradient disagree in sign."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from selective.policies.policy import Policy
from selective.policies.selections import Agreement, Selection
from selective.policies.strengths import Fixed, MeanPreserving, Strength


class Cautious(Policy):
    """Step only where u ⊙ g > 0, scaled so that the mean multiplier is 1.

    Source: Cautious Optimizers, arXiv 2411.16085: u ⊙ phi / mean(phi), with phi = 1 where u ⊙ g > 0 and 0 elsewhere.
    Their code clamps mean(phi) at 1e-3, so that a single aligned coordinate in a million is scaled by 1,000; here the
    scale is at most `cap`. `rest` > 0 attenuates instead of zeroing.
    """

    rest: float = Field(default=0.0, ge=-1, le=1)
    """The multiplier where u ⊙ g is not > 0."""
    cap: float = Field(default=10.0, gt=0)
    """The largest multiplier of the selected."""
    estimate: Literal["exact", "sampled"] = "exact"
    """"sampled" estimates the share that is selected from a sample, as in `MeanPreserving`."""

    def parts(self) -> tuple[Selection, Strength]:
        return Agreement(of="update"), MeanPreserving(rest=self.rest, cap=self.cap, estimate=self.estimate)


class Grams(Policy):
    """Step by the update's magnitude in the gradient's direction: × 1 where their signs agree, × -1 where not.

    Source: Grams, arXiv 2412.17107: sign(g) ⊙ |u|. Where g is exactly 0 (untouched embedding rows) that does not move
    the coordinate; the multiplier there is 0.
    """

    def parts(self) -> tuple[Selection, Strength]:
        return Agreement(of="update"), Fixed(selected=1.0, rest=-1.0, still=True)
