"""Decay: which coordinates decoupled decay reaches, as plain data for the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

DecayKind = Literal["cautious"]
DECAY_KINDS = frozenset(get_args(DecayKind))


@dataclass(frozen=True)
class Decay:
    """The description of the coordinates that the factor of decoupled decay reaches. The factor is the rule's.

    "cautious" (arXiv 2510.12402): those where decay and the update pull the same way, that is where x and the parameter
    have the same sign. x is u, mask * u, or the tensor in the place of the gradient; for a negative learning rate, -u
    or -mask * u. Signs are compared, so that no product can underflow.
    """

    kind: DecayKind = "cautious"
    of: Literal["update", "masked", "gradient"] = "update"
    strict: bool = False  # False: where x is 0, too
