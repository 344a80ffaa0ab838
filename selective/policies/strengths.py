"""Strengths: *how much* of the update the selected coordinates get, and the rest."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import Tensor

from selective.configured import Configured
from selective.kernels import spec
from selective.kernels.reference.masks import strength_of
from selective.policies.view import StepView


class Strength(Configured):
    """The two multipliers of a tensor. Subclass it and override `multipliers` for one of your own."""

    _family: ClassVar[str] = "strength"
    _registry: ClassVar[dict[str, type[Configured]]] = {}
    reads: ClassVar[frozenset[str]] = frozenset({"update", "grad"})

    def needs(self) -> frozenset[str]:
        """Which tensors of the view `multipliers` reads."""
        return self.reads

    def spec(self) -> spec.Strength | None:
        """This strength in the kernels' terms; None for one that only exists in Python."""
        return None

    def init_state(self, view: StepView) -> dict[str, Tensor]:
        """State to keep for each parameter between steps; none unless overridden."""
        return {}

    def multipliers(self, view: StepView, selected: Tensor) -> tuple[Tensor | float, Tensor | float, dict[str, Tensor]]:
        """(multiplier of the selected, of the rest, the new state)."""
        described = self.spec()
        assert described is not None, f"{type(self).__name__} must override multipliers(view, selected)"
        item, _, moved = view.kernel_inputs(self.needs())
        return strength_of(described, selected, item, moved, view.draw)


class Fixed(Strength):
    """Two constants; `still` makes coordinates stand still whose u ⊙ g is exactly 0.

    `Fixed(selected=1, rest=-1, still=True)` on `Agreement` is Grams.
    """

    selected: float = 1.0
    """The multiplier of the selected."""
    rest: float = 0.0
    """The multiplier of the rest."""
    still: bool = False
    """Whether coordinates with u ⊙ g = 0 get 0."""

    def needs(self) -> frozenset[str]:
        return frozenset({"update", "grad"}) if self.still else frozenset()

    def spec(self) -> spec.Strength:
        return spec.Strength("fixed", selected=self.selected, rest=self.rest, still=self.still)


class MeanPreserving(Strength):
    """The selected get what makes the mean multiplier 1: (1 - rest (1 - share)) / share, at most `cap`.

    The default cap of 10 is reached when less than a tenth is selected. 1 where nothing is selected.
    `estimate="sampled"` takes the share from a sample of up to 64k elements.
    """

    rest: float = Field(default=0.0, ge=-1, le=1)
    """The multiplier of the rest."""
    cap: float = Field(default=10.0, gt=0)
    """The largest multiplier of the selected."""
    estimate: Literal["exact", "sampled"] = "exact"

    def needs(self) -> frozenset[str]:
        return frozenset()

    def spec(self) -> spec.Strength:
        return spec.Strength("mean_preserving", rest=self.rest, cap=self.cap, estimate=self.estimate)


class NormPreserving(Strength):
    """The selected get what keeps the L2 norm of x (the update, the momentum or the gradient), at most `cap`.

    a^2 * sum_selected x^2 + rest^2 * sum_rest x^2 = sum x^2. The default cap of 10 is reached when the selected hold
    less than a hundredth of the squares. 1 where the selected hold none.
    """

    rest: float = Field(default=0.0, ge=-1, le=1)
    """The multiplier of the rest."""
    cap: float = Field(default=10.0, gt=0)
    """The largest multiplier of the selected."""
    of: Literal["update", "momentum", "gradient"] = "update"
    """What x is."""
    estimate: Literal["exact", "sampled"] = "exact"

    def needs(self) -> frozenset[str]:
        return frozenset({"grad" if self.of == "gradient" else self.of})

    def spec(self) -> spec.Strength:
        return spec.Strength("norm_preserving", rest=self.rest, cap=self.cap, of=self.of, estimate=self.estimate)


class Alignment(Strength):
    """The selected get the smoothed cosine of momentum and gradient, one number a tensor (Magma); the rest get `rest`.

    s <- smoothing * s + (1 - smoothing) * sigmoid(cos(m, g) / temperature), from s = 1 [ours: the paper's start could
    not be read; the public implementations that could be start from 1].
    """

    temperature: float = Field(default=2.0, gt=0)
    """What the cosine is divided by."""
    smoothing: float = Field(default=0.9, ge=0, lt=1)
    """The share of s that stays in each step."""
    rest: float = 0.0
    """The multiplier of the rest."""

    def needs(self) -> frozenset[str]:
        return frozenset({"grad", "momentum"})

    def spec(self) -> spec.Strength:
        return spec.Strength("alignment", rest=self.rest, temperature=self.temperature, smoothing=self.smoothing)

    def init_state(self, view: StepView) -> dict[str, Tensor]:
        return {"average": torch.ones((), dtype=torch.float32, device=view.device)}


AnyStrength = Annotated[SerializeAsAny[Strength], BeforeValidator(Strength.from_data)]
