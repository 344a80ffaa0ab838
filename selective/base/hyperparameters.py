"""Hyper-parameters of a base's parameter group, read as plain numbers."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.kernels import spec

LOW_PRECISION = (torch.bfloat16, torch.float16)


def sign_of(base: Optimizer, group: dict[str, Any]) -> float:
    """Return -1 if the base maximizes, so that its gradient is the negative of `p.grad`; else 1.

    Some classes keep the flag as an attribute and not in the group.
    """
    return -1.0 if group.get("maximize", getattr(base, "maximize", False)) else 1.0


def sign_of_rate(group: dict[str, Any]) -> spec.Scalar:
    """Return a number with the sign of the group's learning rate; 1.0 if the group has none.

    A rate on a GPU is returned as it is, so that nothing waits for the device.
    """
    rate = plain_number(1.0 if group.get("lr") is None else group["lr"])
    return rate if isinstance(rate, Tensor) else -1.0 if rate < 0 else 1.0


def lookahead(base: Optimizer, group: dict[str, Any]) -> float:
    """Return w such that the momentum one step ahead is (1 - w) g + w m, up to a positive factor.

    w is the coefficient of the base's first moment, looked up under its usual names; 0.9 if there is none. The momentum
    of torch's SGD is a sum and not a mean, m <- mu m + g: there w = mu / (1 + mu), from g + mu m.
    """
    if "betas" in group:  # Lion's first beta is for the update, the second for the momentum
        return float(group["betas"][1 if type(base).__name__ == "Lion" else 0])
    momentum = float(group.get("momentum", group.get("beta", 0.9)) or 0.0)
    return momentum / (1.0 + momentum) if isinstance(base, torch.optim.SGD) else momentum


def scalar(value: Any) -> float:
    """Return a hyper-parameter as a Python number (torch allows `lr` to be a tensor)."""
    return float(value.item()) if isinstance(value, torch.Tensor) else float(value)


def plain_number(value: Any) -> spec.Scalar:
    """Return a hyper-parameter as a Python number; a tensor that is not on the CPU as it is, without waiting for it."""
    return value if isinstance(value, torch.Tensor) and value.device.type != "cpu" else scalar(value)


_NUMBERS = ("lr", "eps", "weight_decay", "momentum", "dampening", "betas")


def check_numbers(base: Optimizer, group: dict[str, Any]) -> None:
    """Refuse a hyper-parameter of a known base that is no number, by the number of its group.

    Raises:
        TypeError: it is something else. A tensor of one element is a number.
        ValueError: `betas` are not two.
    """
    for name in _NUMBERS:
        if name not in group:
            continue
        value = group[name]
        several = name == "betas" and _has_several(value)
        values = list(value) if several else [value]
        if all(map(_is_number, values)):
            if not several or len(values) == 2:
                continue
        number = next((i for i, other in enumerate(base.param_groups) if other is group), "...")
        message = (
            f"SelectiveUpdate: param_groups[{number}][{name!r}] is {value!r}, must be "
            f"{'two numbers' if name == 'betas' else 'a number'}; nothing has moved"
        )
        raise ValueError(message) if several and len(values) != 2 else TypeError(message)


def _is_number(value: Any) -> bool:
    if type(value) in (float, int):  # nearly always: a look at the class alone, in every step
        return True
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, Real) or hasattr(value, "__float__")


def _has_several(value: Any) -> bool:
    """True for a sequence of any class: a tuple, a list, a tensor of one dimension, a configuration's own list."""
    return value.dim() > 0 if isinstance(value, Tensor) else hasattr(value, "__len__") and not isinstance(value, str)
