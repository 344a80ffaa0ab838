"""RandomMask: the baseline, and the matched control of another policy."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from selective.kernels import spec, top_k
from selective.kernels.reference.control import random_subset, scaled
from selective.policies.policy import AnyPolicy, Policy, is_dense_top_k, stands_still, two_multipliers
from selective.policies.selections import Bernoulli, Selection
from selective.policies.strengths import Fixed, Strength
from selective.policies.view import StepView


class RandomMask(Policy):
    """A fair coin for each coordinate, by address: × 1/probability or × 0, or as `selected` and `rest` say."""

    probability: float = Field(default=0.5, gt=0, le=1)
    """Of each unit to be selected."""
    unit: Literal["element", "row", "tensor"] = "element"
    """What a coin is thrown for."""
    selected: float | None = None
    """The multiplier of the selected; None is 1/probability."""
    rest: float = 0.0
    """The multiplier of the rest."""

    def parts(self) -> tuple[Selection, Strength]:
        selected = 1.0 / self.probability if self.selected is None else self.selected
        return Bernoulli(probability=self.probability, unit=self.unit), Fixed(selected=selected, rest=self.rest)

    @staticmethod
    def matching(policy: Policy, norm: bool = True, cap: float = 10.0) -> MatchedRandomMask:
        """The control of `policy`: as many coordinates of each tensor at the same strengths, but random ones."""
        return MatchedRandomMask(policy=policy, norm=norm, cap=cap)


class MatchedRandomMask(Policy):
    """Selects as many coordinates of each tensor as `policy` does in that step, at random, at the same strengths.

    With `norm` the mask is scaled, by at most `cap`, so that ‖mask ⊙ u‖ of each tensor is that policy's: the only
    difference left is *which* coordinates. The random subset has exactly the policy's size. `policy` must have a
    selection and a strength; what it keeps as state (Magma's average) the control keeps too.
    """

    policy: AnyPolicy
    norm: bool = True
    cap: float = Field(default=10.0, gt=0)

    def needs(self) -> frozenset[str]:
        return self.policy.needs() | {"update"}

    def init_state(self, view: StepView) -> dict[str, Tensor]:
        return self.policy.init_state(view)

    def specs(self) -> tuple[spec.Selection, spec.Strength] | None:
        selection, strength = (part.spec() for part in self._matched_parts())
        if not isinstance(selection, spec.Selection) or not isinstance(strength, spec.Strength):
            return None
        return replace(selection, control=spec.Control(norm=self.norm, cap=self.cap)), strength

    def _matched_parts(self) -> tuple[Selection, Strength]:
        parts = self.policy.parts()
        if parts is None:
            raise ValueError(
                f"RandomMask.matching({self.policy!r}): a control needs to know which coordinates the policy selects; "
                f"build it as Policy(selection=..., strength=...) instead of with a mask of its own"
            )
        return parts

    @model_validator(mode="after")
    def _has_parts(self) -> MatchedRandomMask:
        self._matched_parts()  # refuse where it is written, not in the first step
        return self

    def mask(self, view: StepView) -> tuple[Tensor, dict[str, Tensor]]:
        selection, strength = self._matched_parts()
        theirs = selection.select(view)
        one = torch.ones((), dtype=view.dtype, device=view.device)
        if is_dense_top_k(selection, theirs.numel()):
            return one, dict(view.state)
        a, b, state = strength.multipliers(view, theirs)
        still = stands_still(strength, view)
        ours = _random_subset(view, theirs, still)
        pair = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
        control = spec.Control(norm=self.norm, cap=self.cap)
        above, below = scaled(control, theirs, ours, pair, view.update, still)
        return two_multipliers(view, ours, above, below, still), state


def _random_subset(view: StepView, theirs: Tensor, still: Tensor | None) -> Tensor:
    """As many coordinates as `theirs` selects, the ones with the largest random numbers; without a host sync.

    Those that stand still come last: chosen, they would be a choice without effect.
    """
    if view.device.type != "cpu":
        return random_subset(theirs, still, view.draw, view.address)
    numbers = view.random().to(view.dtype)  # the same by a bracket, which has to know on the host how many there are
    if still is not None:
        numbers = torch.where(still, -1.0, numbers)
    return top_k(numbers, int(theirs.sum()))
