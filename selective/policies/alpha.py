"""AlphaConsistency: our reading of AlphaAdam (arXiv 2501.18094)."""

from __future__ import annotations

from typing import Literal

from selective.policies.policy import Policy
from selective.policies.selections import Agreement, Selection
from selective.policies.strengths import AnyStrength, NormPreserving, Strength


class AlphaConsistency(Policy):
    """Step only where the historical momentum agrees with the gradient, stronger to make up for the rest.

        phi = 1[m_{t-1} ⊙ g > 0],  alpha = min(cap, ‖m_t‖ / ‖phi ⊙ m_t‖),  update = alpha · phi ⊙ u

    Source: AlphaAdam, arXiv 2501.18094. Its mask follows from the consistency of historical momentum and gradient
    direction, and an adaptive strength ("dynamic alpha") compensates for what was masked out. The formula of alpha,
    its norm and its clipping could not be read anywhere: v2 was withdrawn over a theorem's assumption, and the code is
    gone. They are our choice, and this is not "AlphaAdam exactly". We take the norm of the momentum because every
    momentum optimizer has one. A tensor whose previous momentum is zero (the first step) is stepped densely.

    Other readings: `momentum="current"`; as `strength`, `MeanPreserving(...)`, `Fixed(selected=alpha, rest=gamma)` or
    `NormPreserving(of="update")` or `of="gradient"`; in any of them a `rest` > 0, which attenuates instead of zeroing.
    """

    momentum: Literal["previous", "current"] = "previous"
    """The momentum whose sign is compared with the gradient's: before or after the gradient was mixed in."""
    strength: AnyStrength = NormPreserving(of="momentum", rest=0.0, cap=2.0)
    """The two multipliers."""
    strict: bool = True
    """True: a product of exactly 0 is not selected."""

    def parts(self) -> tuple[Selection, Strength]:
        return Agreement(momentum=self.momentum, of="momentum", strict=self.strict), self.strength
