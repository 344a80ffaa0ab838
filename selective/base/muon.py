"""torch's Muon: the hyper-parameters that its update is made with, and the groups that are left to its own step."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selective.base.hyperparameters import plain_number
from selective.kernels import spec
from selective.parameter import initialized
from selective.sharding.dtensor import is_dtensor

Group = dict[str, Any]
# `foreach`, `fused` and `capturable` are options that a newer torch may add. They would not change the result.
_KNOWN = frozenset(
    "self params lr weight_decay momentum nesterov ns_coefficients eps ns_steps adjust_lr_fn "
    "foreach fused capturable".split()
)
_OPTIONS = frozenset(inspect.signature(torch.optim.Muon.__init__).parameters)  # of this torch


@dataclass(frozen=True)
class MuonNumbers:
    """The hyper-parameters of one group that Muon's update is made with."""

    momentum: float
    nesterov: bool
    coefficients: tuple[float, float, float]
    steps: int
    eps: float
    rate: spec.Scalar
    adjust: str | None

    def rate_of(self, shape: tuple[int, ...]) -> spec.Scalar:
        """Return the learning rate of a matrix of this shape, as torch's `adjust_lr_fn` has it."""
        rows, columns = shape
        if self.adjust == "match_rms_adamw":
            return self.rate * (0.2 * math.sqrt(max(rows, columns)))
        return self.rate * math.sqrt(max(1.0, rows / max(columns, 1)))


def numbers_of(group: Group) -> MuonNumbers:
    """Return the hyper-parameters of this group.

    Raises:
        ValueError: torch's own step would refuse them, too.
    """
    if group["ns_steps"] >= 100:
        raise ValueError(f"Muon: ns_steps is {group['ns_steps']}, must be less than 100")
    if len(group["ns_coefficients"]) != 3:
        raise ValueError(f"Muon: ns_coefficients is {group['ns_coefficients']}, must have 3 numbers")
    return MuonNumbers(
        momentum=group["momentum"], nesterov=bool(group["nesterov"]), coefficients=tuple(group["ns_coefficients"]),
        steps=group["ns_steps"], eps=group["eps"], rate=plain_number(group["lr"]), adjust=group["adjust_lr_fn"],
    )  # fmt: skip


def not_covered(group: Group) -> str | None:
    """Return in words what of this group is left to the base's own step; None if our rule covers all of it."""
    strange = next((name for name in sorted(_OPTIONS - _KNOWN) if group.get(name)), None)
    if strange is not None:
        return f"{strange}={group[strange]!r}"
    if group["adjust_lr_fn"] not in (None, "original", "match_rms_adamw"):
        return f"adjust_lr_fn={group['adjust_lr_fn']!r}"
    if isinstance(group["momentum"], Tensor):
        return "a momentum that is a tensor"
    reasons = (_why_not(p, group["nesterov"]) for p in initialized(group["params"]))
    return next((why for why in reasons if why is not None), None)


def _why_not(p: Tensor, nesterov: bool) -> str | None:
    """Return in words why this parameter is left to the base's own step; None if it is not.

    torch divides a copy of the momentum in bfloat16 by its norm. Without Nesterov, a momentum in bfloat16 is that copy
    itself, and the division stays in it.
    """
    if is_dtensor(p):
        return "DTensors: Newton-Schulz needs whole matrices, which the base gathers"
    if type(p) not in (Tensor, torch.nn.Parameter):
        return f"a parameter that is a {type(p).__name__}"
    if p.dim() != 2:
        return f"a parameter of {p.dim()} dimensions"
    if p.dtype == torch.bfloat16 and not nesterov:
        return "nesterov=False with bfloat16 parameters, where torch normalises the momentum itself"
    return None
