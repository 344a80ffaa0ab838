"""The parts of a step of torch's Muon, for prototypes that put something before or behind the orthogonalisation.

They take stacks [count, rows, columns] of matrices of one shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evidence.prototypes.stacks import Stack
from selective.kernels.newton_schulz import newton_schulz_

many: Any = torch  # the home of the multi-tensor functions, for which torch declares no types
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS, EPS = 5, 1e-7


def nesterov(grad: Tensor, momentum: Tensor, beta: float) -> Tensor:
    """The update of this step before it is orthogonalised. The momentum moves."""
    momentum.lerp_(grad, 1 - beta)
    return grad.lerp(momentum, beta)


def orthogonalise_(updates: Sequence[Tensor]) -> None:
    """Put the nearest orthogonal matrix in the place of each, by Newton-Schulz.

    All stacks of a shape, and of its transposed one, are iterated together.
    """
    alike: dict[object, list[Tensor]] = {}
    for update in updates:
        alike.setdefault((tuple(sorted(update.shape[1:])), update.device), []).append(update)
    for stacks in alike.values():
        newton_schulz_(stacks, [1.0] * len(stacks), steps=STEPS, coefficients=COEFFICIENTS, eps=EPS)


def subtract(stack: Stack, update: Tensor) -> None:
    """Decay parameters and subtract their updates times the rate, with Muon's factor for tall matrices."""
    group, (rows, columns) = stack.group, update.shape[1:]
    many._foreach_mul_(stack.params, 1 - group["lr"] * group["weight_decay"])
    scale = group["lr"] * math.sqrt(max(1.0, rows / columns))
    many._foreach_sub_(stack.params, list(update.unbind()), alpha=scale)
