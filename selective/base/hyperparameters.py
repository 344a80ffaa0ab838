"""Hyper-parameters of a base's parameter group, read as plain numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.kernels import spec

LOW_PRECISION = (torch.bfloat16, torch.float16)


def sign_of(base: Optimizer, group: dict[str, Any]) -> float:
    """-1 where the base maximizes: its gradient is the negative of `p.grad`. Some keep the flag on themselves."""
    return -1.0 if group.get("maximize", getattr(base, "maximize", False)) else 1.0


def sign_of_rate(group: dict[str, Any]) -> spec.Scalar:
    """Whose sign is that of the group's learning rate; 1.0 where it has none. A rate on a GPU is not waited for."""
    rate = plain_number(1.0 if group.get("lr") is None else group["lr"])
    return rate if isinstance(rate, Tensor) else -1.0 if rate < 0 else 1.0


def lookahead(base: Optimizer, group: dict[str, Any]) -> float:
    """w such that the momentum one step ahead is (1 - w) g + w m, up to a positive factor.

    It is the coefficient of the base's first moment, by its usual names (0.9 where it has none of them); for torch's
    SGD, whose m <- mu m + g is a sum and not a mean, g + mu m has w = mu / (1 + mu).
    """
    if "betas" in group:  # Lion's first one is of the update, its momentum moves with the second
        return float(group["betas"][1 if type(base).__name__ == "Lion" else 0])
    momentum = float(group.get("momentum", group.get("beta", 0.9)) or 0.0)
    return momentum / (1.0 + momentum) if isinstance(base, torch.optim.SGD) else momentum


def scalar(value: Any) -> float:
    """A hyper-parameter as a Python number (torch allows `lr` to be a tensor)."""
    return float(value.item()) if isinstance(value, torch.Tensor) else float(value)


def plain_number(value: Any) -> spec.Scalar:
    """A hyper-parameter as a Python number; a tensor on another device stays one: reading it would wait for that."""
    return value if isinstance(value, torch.Tensor) and value.device.type != "cpu" else scalar(value)
