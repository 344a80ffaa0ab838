"""RandomMask, a random baseline, and MatchedRandomMask, the random control of another policy."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from selective.kernels import spec, top_k
from selective.kernels.reference.control import random_subset, scaled
from selective.kernels.reference.random import ranking_bits
from selective.policies.policy import AnyPolicy, Policy, is_dense_top_k, still_coordinates, two_multipliers
from selective.policies.selections import Bernoulli, Selection
from selective.policies.strengths import Fixed, Strength
from selective.policies.view import StepView


class RandomMask(Policy):
    """Flip a coin for each coordinate: step it × 1/probability or × 0, or as `selected` and `rest` say.

    The coins are those of `Bernoulli`: they follow from the seed, the step and the coordinate's place alone.
    """

    probability: float = Field(default=0.5, gt=0, le=1)
    """The probability that a unit is selected."""
    unit: Literal["element", "row", "tensor"] = "element"
    """The unit that gets a coin of its own."""
    selected: float | None = None
    """The multiplier of the selected; None is 1/probability."""
    rest: float = 0.0
    """The multiplier of the rest."""

    def parts(self) -> tuple[Selection, Strength]:
        selected = 1.0 / self.probability if self.selected is None else self.selected
        return Bernoulli(probability=self.probability, unit=self.unit), Fixed(selected=selected, rest=self.rest)

    @staticmethod
    def matching(policy: Policy, norm: bool = True, cap: float = 10.0) -> MatchedRandomMask:
        """The control of `policy`: as many coordinates of each tensor at the same strengths, chosen at random."""
        return MatchedRandomMask(policy=policy, norm=norm, cap=cap)


class MatchedRandomMask(Policy):
    """Select as many coordinates of each tensor as `policy` does in that step, at random, at the same strengths.

    The random subset has exactly the policy's size. With `norm` the mask is scaled so that ‖mask ⊙ u‖ of each tensor
    is the policy's; the only difference left is *which* coordinates are selected. The control keeps the state that
    `policy` keeps (Magma's average). A `policy` without a selection and a strength raises `ValueError`.
    """

    policy: AnyPolicy
    """The policy that is matched."""
    norm: bool = True
    """True: scale the mask so that each tensor's update has the norm that `policy` would give it."""
    cap: float = Field(default=10.0, gt=0)
    """The largest factor of that scaling."""

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
        self._matched_parts()  # refuse at construction, not in the first step
        return self

    def mask(self, view: StepView) -> tuple[Tensor, dict[str, Tensor]]:
        selection, strength = self._matched_parts()
        theirs = selection.select(view)
        one = torch.ones((), dtype=view.dtype, device=view.device)
        if is_dense_top_k(selection, theirs.numel()):
            return one, dict(view.state)
        multiplier, rest, state = strength.multipliers(view, theirs)
        still = still_coordinates(strength, view)
        ours = _random_subset(view, theirs, still)
        pair = torch.as_tensor(multiplier, dtype=torch.float64), torch.as_tensor(rest, dtype=torch.float64)
        control = spec.Control(norm=self.norm, cap=self.cap)
        of_selected, of_rest = scaled(control, theirs, ours, pair, view.update, still)
        return two_multipliers(view, ours, of_selected, of_rest, still), state


def _random_subset(view: StepView, theirs: Tensor, still: Tensor | None) -> Tensor:
    """Select as many coordinates as `theirs`: those with the largest random numbers. Never waits for a GPU.

    Coordinates that are multiplied by 0 anyway (`still`) come last, because selecting them has no effect.
    """
    if view.device.type != "cpu":
        return random_subset(theirs, still, view.draw, view.address)
    # The same subset, by a top-K whose K is read on the host.
    numbers = ranking_bits(view.draw, view.address, theirs.numel()).to(view.dtype).reshape(theirs.shape)
    if still is not None:
        numbers = torch.where(still, -1.0, numbers)
    return top_k(numbers, int(theirs.sum()))
