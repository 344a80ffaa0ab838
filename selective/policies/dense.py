"""Dense: no selection at all."""

from __future__ import annotations

from selective.policies.policy import Policy
from selective.policies.selections import Everything, Selection
from selective.policies.strengths import Fixed, Strength


class Dense(Policy):
    """Step every coordinate × 1. The base takes the step itself, so the result is the base's bit for bit."""

    def parts(self) -> tuple[Selection, Strength]:
        return Everything(), Fixed(selected=1.0, rest=1.0)
