"""The rules of base optimizers as plain data: the hyper-parameters of one parameter group, and facts about the rule.

How the moments move is code of each device, in the file of the same name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

Scalar = float | Tensor  # a Python number, or a 0-d tensor (torch allows `lr` to be one)


# Each rule knows these facts about itself:
#   state_names        the state entries that it reads and that are shaped like the parameter
#   first_moment       the state entry that holds the momentum after the step; None if there is no momentum
#   previous_momentum  the state entry that holds the momentum before the step, until the rule moves it
#   counts_steps       whether its state has a step counter, `step` (0-d), which it counts up
#   decay_is_coupled   whether weight decay is added to the gradient, and not a factor on the parameter
#   coupled_decay      the weight decay that is added to the gradient
#   has_decay_factor   whether the parameter is multiplied by a factor. For Lion and a given update this is always True:
#                      otherwise a factor that a schedule takes through 1 would compile another kernel


@dataclass(frozen=True)
class AdamRule:
    """torch's Adam and AdamW. State: `step` (0-d), `exp_avg`, `exp_avg_sq`, with amsgrad `max_exp_avg_sq`."""

    lr: Scalar
    beta1: Scalar
    beta2: Scalar
    eps: float
    weight_decay: float = 0.0
    decoupled: bool = True
    amsgrad: bool = False
    maximize: bool = False
    first_moment: ClassVar[str] = "exp_avg"
    previous_momentum: ClassVar[str] = "exp_avg"
    counts_steps: ClassVar[bool] = True

    @property
    def state_names(self) -> tuple[str, ...]:
        """The state entries that the rule reads and that are shaped like the parameter."""
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if self.amsgrad else ("exp_avg", "exp_avg_sq")

    @property
    def decay_is_coupled(self) -> bool:
        """True if weight decay is added to the gradient."""
        return not self.decoupled

    @property
    def coupled_decay(self) -> float:
        """The weight decay that is added to the gradient."""
        return 0.0 if self.decoupled else self.weight_decay

    @property
    def has_decay_factor(self) -> bool:
        """True if the parameter is multiplied by a factor (decoupled decay)."""
        return self.decoupled and self.weight_decay != 0


@dataclass(frozen=True)
class SGDRule:
    """torch's SGD. State: `momentum_buffer` where momentum is not 0 (absent or None before the first step)."""

    lr: Scalar
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0  # coupled, as torch has it
    maximize: bool = False
    factor: Scalar | None = None  # the parameter is multiplied by it (decoupled decay, which torch's SGD lacks)
    counts_steps: ClassVar[bool] = False
    decay_is_coupled: ClassVar[bool] = True

    @property
    def state_names(self) -> tuple[str, ...]:
        """The state entries that the rule reads and that are shaped like the parameter."""
        return () if self.momentum == 0 else ("momentum_buffer",)

    @property
    def first_moment(self) -> str | None:
        """The state entry that holds the momentum after the step; None if there is no momentum."""
        return None if self.momentum == 0 else "momentum_buffer"

    @property
    def previous_momentum(self) -> str | None:
        """The state entry that holds the momentum until the rule moves it; None if there is no momentum."""
        return self.first_moment

    @property
    def coupled_decay(self) -> float:
        """The weight decay that is added to the gradient."""
        return self.weight_decay

    @property
    def has_decay_factor(self) -> bool:
        """True if the parameter is multiplied by a factor."""
        return self.factor is not None


@dataclass(frozen=True)
class LionRule:
    """Lion (arXiv 2302.06675): u = lr * sign(beta1 m + (1 - beta1) g), then m moves with beta2. State: `exp_avg`."""

    lr: Scalar
    beta1: Scalar
    beta2: Scalar
    decay_factor: Scalar = 1.0  # the parameter is multiplied by it (decoupled decay)
    weight_decay: float = 0.0  # coupled: added to the gradient
    maximize: bool = False
    state_names: ClassVar[tuple[str, ...]] = ("exp_avg",)
    first_moment: ClassVar[str] = "exp_avg"
    previous_momentum: ClassVar[str] = "exp_avg"
    counts_steps: ClassVar[bool] = False
    decay_is_coupled: ClassVar[bool] = True
    has_decay_factor: ClassVar[bool] = True

    @property
    def coupled_decay(self) -> float:
        """The weight decay that is added to the gradient."""
        return self.weight_decay


@dataclass(frozen=True)
class GivenRule:
    """An update that somebody else computed: p <- factor * start + (offset - mask) * u.

    State: `update` holds u (or -u where `negated`), may share storage with the parameter; `start` the parameter
    before the step; optionally `momentum` and `previous_momentum`. The gradient is taken as it is given.
    scratch: start = the saved copy, offset 0. delta: start = the parameter after the base's step, offset 1, so that
    where the mask is 1 the result is exactly the base's.
    """

    factor: Scalar = 1.0
    offset: float = 0.0
    negated: bool = False
    momentum_beta: float = 0.95  # top_k's "nesterov" score: (1 - beta) g + beta m, m a running average (Muon's)
    rate: Scalar = 1.0  # the base's learning rate, of which only the sign is read: Note [a negative learning rate]
    maximize: ClassVar[bool] = False  # the gradient is taken as it is given,
    coupled_decay: ClassVar[float] = 0.0  # and nothing is added to it
    state_names: ClassVar[tuple[str, ...]] = ("update", "start", "momentum", "previous_momentum")
    first_moment: ClassVar[str] = "momentum"
    previous_momentum: ClassVar[str] = "previous_momentum"
    counts_steps: ClassVar[bool] = False
    decay_is_coupled: ClassVar[bool] = False
    has_decay_factor: ClassVar[bool] = True


Rule = AdamRule | SGDRule | LionRule | GivenRule  # The rule by which the moments of a parameter group move.
