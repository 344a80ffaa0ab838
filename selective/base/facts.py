"""BaseFacts: the facts about one parameter group of a base, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Decay = Literal["none", "coupled", "decoupled", "inside"]

# Formulas of the factor of decoupled decay, by the name that `explain()` prints; `decay.FORMULAS` computes them.
LR_DECAY = "1 - lr*weight_decay"
DECAY = "1 - weight_decay"
RELATIVE_LR = "1 - lr/max_lr*weight_decay"
PROXIMAL = "1 / (1 + lr*weight_decay)"
FROM_SECOND_STEP = "1 - lr*weight_decay, from the second step on"
TRANSFORMERS_ADAFACTOR = "1 - weight_decay*base._get_lr(group, state)"
STABLE_ADAMW = "1 - lr/max(1, RMS of g/sqrt(v))*weight_decay"

# Formulas whose factor differs between the parameters of a group.
PER_PARAMETER = frozenset((FROM_SECOND_STEP, TRANSFORMERS_ADAFACTOR, STABLE_ADAMW))


@dataclass(frozen=True)
class BaseFacts:
    """The facts about a base and one of its parameter groups: how a step treats parameters, decay, gradients and state.

    They hold for the class, the options, and the numbers of dimensions, dtypes and devices of the parameters, at any
    `lr` and `weight_decay`.
    """

    depends_on_param: bool = False
    """True if the update depends on the parameter's value in another way than by decay (Adafactor's scale, LAMB's trust
    ratio)."""
    decay: Decay = "none"
    """"none": there is no `weight_decay`, or it has no effect. "coupled": decay is added to the gradient. "decoupled":
    the step is `p ← factor·p − u`, the factor is the same for all coordinates of a parameter and known before the step,
    and decay leaves no trace in the state. "inside": anything else (LAMB's trust ratio, NovoGrad's momentum, AdamS's
    sum over parameters)."""
    decay_sign: float = 1.0
    """For coupled decay: `decay_sign · weight_decay · p` is what the base adds to the raw `p.grad` (−1: `maximize`)."""
    decay_rule: str | None = None
    """For decoupled decay: the factor's formula, a key of `decay.FORMULAS`, or "measured" if none of them fits."""
    momentum_key: str | None = None
    """The state entry that is a first moment of the raw gradient (not rotated, not normalised). An entry "b" of a
    nested dictionary "a" is "a.b"."""
    momentum_reader: Literal["plain", "dequantize"] | None = None
    """The way in which `read_momentum` reads that entry."""
    embeds_param: tuple[str, ...] = ()
    """Parameter-shaped state entries that follow the iterates (z of schedule-free and of FTRL, p0, ax, x0)."""
    residue: tuple[str, ...] = ()
    """State entries that hold the rounding residue of a low-precision parameter (Kahan sums, master weights)."""
    writes_grad: bool = False
    """True if the step changes `p.grad` in place or replaces it, be it only with weight decay."""
    clears_grad: bool = False
    """True if the step sets `p.grad` to None."""
    keeps_memory: bool = False
    """True if the step writes to memory that the base remembers (a flat buffer, views) instead of to the present
    `p.data`. Then a parameter's memory must not be exchanged for the time of a step."""
    stateless: bool = False
    """True if nothing is kept between steps (SGD without momentum)."""
    refusal: str | None = None
    """The reason why this base cannot be wrapped, and what to do instead; None if it can be wrapped."""
    source: Literal["measured", "table"] = "measured"

    @property
    def decay_per_parameter(self) -> bool:
        """True if `decay_factor` differs between the parameters of a group and has to be computed for each."""
        return self.decay == "decoupled" and (self.decay_rule == "measured" or self.decay_rule in PER_PARAMETER)
