"""Strengths, which say by *how much* the selected coordinates are multiplied, and the rest."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import Tensor

from selective.configured import Configured
from selective.kernels import spec
from selective.kernels.reference.strengths import strength_of
from selective.policies.view import StepView


class Strength(Configured):
    """Makes the two multipliers of a tensor. Subclass it and override `multipliers` to write your own."""

    _family: ClassVar[str] = "strength"
    _registry: ClassVar[dict[str, type[Configured]]] = {}
    _state_is_kept: ClassVar[str] = (
        "make what changes from step to step in init_state(view), and return it as the third result of multipliers"
    )
    reads: ClassVar[frozenset[str]] = frozenset({"update", "grad"})
    """The tensors of the view that `multipliers` reads: any of update, grad, momentum, previous_momentum, param."""

    def needs(self) -> frozenset[str]:
        """The names of the view's tensors that `multipliers` reads."""
        return self.reads

    def spec(self) -> spec.Strength | None:
        """This strength in the kernels' terms; None for one that exists in Python only."""
        return None

    def init_state(self, view: StepView) -> dict[str, Tensor]:
        """The initial state of one parameter: tensors, each 0-d or shaped like it. Empty unless overridden."""
        return {}

    def multipliers(self, view: StepView, selected: Tensor) -> tuple[Tensor | float, Tensor | float, dict[str, Tensor]]:
        """The multiplier of the selected, the multiplier of the rest, and the new state.

        `selected` is a bool tensor shaped like the parameter. A multiplier is a number or a 0-d tensor.
        """
        described = self.spec()
        assert described is not None, f"{type(self).__name__} must override multipliers(view, selected)"
        item, _, moved = view.kernel_inputs(self.needs())
        return strength_of(described, selected, item, moved, view.draw)


class Fixed(Strength):
    """Multiply by two constants.

    `Fixed(selected=1, rest=-1, still=True)` on `Agreement` is Grams.
    """

    selected: float = 1.0
    """The multiplier of the selected."""
    rest: float = 0.0
    """The multiplier of the rest."""
    still: bool = False
    """True: multiply coordinates whose u ⊙ g is exactly 0 by 0."""

    def needs(self) -> frozenset[str]:
        return Fixed.spec(self).reads

    def spec(self) -> spec.Strength:
        return spec.Strength("fixed", selected=self.selected, rest=self.rest, still=self.still)


class MeanPreserving(Strength):
    """Multiply the selected by (1 - rest (1 - share)) / share, at most `cap`, so that the mean multiplier is 1.

    `share` is the share of the tensor that is selected. The multiplier is 1 if nothing is selected. The default cap
    of 10 is reached when less than a tenth is selected.
    """

    rest: float = Field(default=0.0, ge=-1, le=1)
    """The multiplier of the rest."""
    cap: float = Field(default=10.0, gt=0)
    """The largest multiplier of the selected."""
    estimate: Literal["exact", "sampled"] = "exact"
    """"sampled" estimates the share from a sample of up to 64k elements."""

    def needs(self) -> frozenset[str]:
        return frozenset()

    def spec(self) -> spec.Strength:
        return spec.Strength("mean_preserving", rest=self.rest, cap=self.cap, estimate=self.estimate)


class NormPreserving(Strength):
    """Multiply the selected by the a that keeps the L2 norm of x (the update, the momentum or the gradient).

    a² · sum_selected x² + rest² · sum_rest x² = sum x², with a at most `cap`, which is reached by default (10) when the
    selected hold less than a hundredth of the squares. a is 1 if they hold none, or if the sum is not finite.
    """

    rest: float = Field(default=0.0, ge=-1, le=1)
    """The multiplier of the rest."""
    cap: float = Field(default=10.0, gt=0)
    """The largest multiplier of the selected."""
    of: Literal["update", "momentum", "gradient"] = "update"
    """The tensor x whose norm is kept."""
    estimate: Literal["exact", "sampled"] = "exact"
    """"sampled" estimates the sums from a sample of up to 64k elements."""

    def needs(self) -> frozenset[str]:
        return NormPreserving.spec(self).reads

    def spec(self) -> spec.Strength:
        return spec.Strength("norm_preserving", rest=self.rest, cap=self.cap, of=self.of, estimate=self.estimate)


class Alignment(Strength):
    """Multiply the selected by s, a smoothed cosine of momentum and gradient, one number a tensor (Magma's strength).

    s <- smoothing * s + (1 - smoothing) * sigmoid(cos(m, g) / temperature), from s = 1. The start is ours: the paper's
    could not be read, and the public implementations that could be read start from 1. s is kept in the policy's state
    (`average`, float32).
    """

    temperature: float = Field(default=2.0, gt=0)
    """The divisor of the cosine of momentum and gradient."""
    smoothing: float = Field(default=0.9, ge=0, lt=1)
    """The share of s that stays in each step."""
    rest: float = 0.0
    """The multiplier of the rest."""

    def needs(self) -> frozenset[str]:
        return Alignment.spec(self).reads

    def spec(self) -> spec.Strength:
        return spec.Strength("alignment", rest=self.rest, temperature=self.temperature, smoothing=self.smoothing)

    def init_state(self, view: StepView) -> dict[str, Tensor]:
        return {"average": torch.ones((), dtype=torch.float32, device=view.device)}


AnyStrength = Annotated[SerializeAsAny[Strength], BeforeValidator(Strength.part_from_data)]
