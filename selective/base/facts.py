"""What is known about a base: plain facts, as measured or as the table has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Decay = Literal["none", "coupled", "decoupled", "inside"]


# Formulas of `decay.RULES` whose factor is each parameter's own.
PER_PARAMETER = frozenset(
    (
        "1 - lr*weight_decay, from the second step on",
        "1 - weight_decay*base._get_lr(group, state)",
        "1 - lr/max(1, RMS of g/sqrt(v))*weight_decay",
    )
)


@dataclass(frozen=True)
class BaseFacts:
    """What one parameter group of a base does with parameters, decay, gradients and state.

    Facts hold for the kind of group (class, options, number of dimensions, dtype, device), whatever `lr` and
    `weight_decay` are at the moment.
    """

    depends_on_param: bool = False
    """The update looks at the parameter's value (Adafactor's scale, LAMB's trust ratio), decay aside."""
    decay: Decay = "none"
    """"none": there is no `weight_decay`, or it does nothing. "coupled": it is added to the gradient. "decoupled": the
    step is `p ← factor·p − u` with one factor for all coordinates, which can be told before the step, and nothing of it
    is in the state. "inside": anything else (LAMB's trust ratio, NovoGrad's momentum, AdamS's sum over parameters)."""
    decay_sign: float = 1.0
    """Coupled: the base acts as if `decay_sign · weight_decay · p` were added to the raw `p.grad` (−1: `maximize`)."""
    decay_rule: str | None = None
    """Decoupled: the formula of the factor, a key of `decay.RULES`, or "measured" when none of them fits."""
    momentum_key: str | None = None
    """The state entry that is a first moment of the raw gradient (not rotated, not normalised). Nested: "a.b"."""
    momentum_reader: Literal["plain", "dequantize"] | None = None
    """How `read_momentum` turns that entry into float32."""
    embeds_param: tuple[str, ...] = ()
    """Parameter-shaped state entries that follow the iterates (z of schedule-free and of FTRL, p0, ax, x0)."""
    residue: tuple[str, ...] = ()
    """State entries that keep what rounding took from a low-precision parameter (Kahan sums, master weights)."""
    writes_grad: bool = False
    """The step changes `p.grad` in place, or puts another tensor there, with or without weight decay."""
    clears_grad: bool = False
    """The step sets `p.grad` to None."""
    keeps_memory: bool = False
    """The step writes to memory that the base got hold of earlier (a flat buffer, views) and not to where `p.data` is
    now: a parameter's memory must not be exchanged for another."""
    stateless: bool = False
    """Nothing is kept between steps (SGD without momentum)."""
    refusal: str | None = None
    """Why this base cannot be wrapped, and what to do instead; None when it can be."""
    source: Literal["measured", "table"] = "measured"

    @property
    def decay_per_parameter(self) -> bool:
        """Whether `decay_factor` differs between the parameters of a group and has to be asked for each."""
        return self.decay == "decoupled" and (self.decay_rule == "measured" or self.decay_rule in PER_PARAMETER)
