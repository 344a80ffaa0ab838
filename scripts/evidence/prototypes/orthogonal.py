"""The parts of a step of torch's Muon, for prototypes that put something before or behind the orthogonalisation."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from selective.kernels.newton_schulz import newton_schulz_

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS, EPS = 5, 1e-7


def nesterov(grad: Tensor, momentum: Tensor, beta: float) -> Tensor:
    """The update of this step before it is orthogonalised. The momentum moves."""
    momentum.lerp_(grad, 1 - beta)
    return grad.lerp(momentum, beta)


def orthogonalised(update: Tensor) -> Tensor:
    """The nearest orthogonal matrix of an update, by Newton-Schulz. The update has the same memory."""
    newton_schulz_([update[None]], [1.0], steps=STEPS, coefficients=COEFFICIENTS, eps=EPS)
    return update


def subtract(p: Tensor, update: Tensor, group: dict[str, Any]) -> None:
    """Decay a parameter and subtract the update times the rate, with Muon's factor for tall matrices."""
    p.mul_(1 - group["lr"] * group["weight_decay"])
    p.sub_(update, alpha=group["lr"] * math.sqrt(max(1.0, p.shape[0] / p.shape[1])))
