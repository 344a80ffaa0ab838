"""MGUP and CautiousMGUP: momentum-gradient alignment by rank or by sign (NeurIPS 2025, arXiv 2606.17526)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from selective.policies.policy import Policy
from selective.policies.selections import Agreement, Selection, TopK
from selective.policies.strengths import Fixed, Strength


class MGUP(Policy):
    """Step the K = int(tau d) coordinates of a tensor with the largest signed score u ⊙ g × alpha, the rest × gamma.

    d is the tensor's number of elements. alpha = 1/tau and gamma = tau unless given.

    Source: arXiv 2606.17526. The official code differs in two points: its gamma is 0.1, and a tensor with K = 0 (one
    element) stays at × gamma forever, where we leave it dense. `MGUP(alpha=2, gamma=0.1)` follows its AdamW and Lion;
    with `score="nesterov"` it follows its Muon. For large models the authors advise alpha in [1, 1.5] and gamma in
    [0.5, 1]. Their convergence proof needs gamma > 0.
    """

    tau: float = Field(default=0.5, gt=0, le=1)
    """The share of each tensor that is selected."""
    alpha: float | None = Field(default=None, ge=0)
    """The multiplier of the selected; None is 1/tau."""
    gamma: float | None = Field(default=None, ge=0)
    """The multiplier of the rest; None is tau."""
    score: Literal["update", "momentum", "nesterov"] = "update"
    """The score that is ranked, as in `TopK`."""
    quantile: Literal["exact", "sampled"] = "exact"
    """"exact" or "sampled" threshold, as in `TopK`."""

    def parts(self) -> tuple[Selection, Strength]:
        return (
            TopK(fraction=self.tau, score=self.score, quantile=self.quantile),
            _two_constants(self.tau, self.alpha, self.gamma),
        )


class CautiousMGUP(Policy):
    """MGUP without the ranking: × alpha where u ⊙ g ≥ 0, × gamma elsewhere.

    Source: arXiv 2606.17526. The official code has ≥; the paper has >, which is `strict=True`. alpha and gamma are
    those of `MGUP`.
    """

    tau: float = Field(default=0.5, gt=0, le=1)
    """Sets the defaults of alpha and gamma. The share that is selected follows from the signs."""
    alpha: float | None = Field(default=None, ge=0)
    """The multiplier of the selected; None is 1/tau."""
    gamma: float | None = Field(default=None, ge=0)
    """The multiplier of the rest; None is tau."""
    strict: bool = False
    """True: select where u ⊙ g > 0, not where it is ≥ 0."""

    def parts(self) -> tuple[Selection, Strength]:
        return Agreement(of="update", strict=self.strict), _two_constants(self.tau, self.alpha, self.gamma)


def _two_constants(tau: float, alpha: float | None, gamma: float | None) -> Fixed:
    return Fixed(selected=1.0 / tau if alpha is None else alpha, rest=tau if gamma is None else gamma)
