"""factor · parameter + scale · x in one pass over both, by torch's fused SGD kernel, or in two where that does not fit.

The kernel computes p -= lr (x + decay p), without momentum. Of the two roundings more, each is of the step and not of
the parameter.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .chunks import buffer, spans

_FUSED_SGD: Any = getattr(torch, "_fused_sgd_", None)  # a private function, so looked up and not taken for granted
SMALLEST, LARGEST = 2.0**-20, 2.0**20  # the scales, and the decays over a scale, that the kernel is given


def _run(param: Tensor, factor: float, x: Tensor, scale: float) -> None:
    _FUSED_SGD(
        [param], [x], [], weight_decay=(factor - 1) / scale, momentum=0.0, lr=-scale, dampening=0.0, nesterov=False,
        maximize=False, is_first_step=False,
    )  # fmt: skip


@functools.cache
def _trusted() -> bool:
    """True if torch has the kernel and it computes this. Tried once, on 83 elements, to 4 eps."""
    if _FUSED_SGD is None:
        return False
    x = torch.linspace(-1.0, 1.0, 83, dtype=torch.float32, device="cpu")
    param = x.roll(7)
    wanted, size = 0.75 * param.double() - 0.3 * x.double(), param.abs() + x.abs()
    try:
        _run(param, 0.75, x, -0.3)
    except (RuntimeError, TypeError):  # no CPU kernel in this build, or another signature
        return False
    return bool(((param - wanted).abs() <= 4 * torch.finfo(torch.float32).eps * size).all())


def add_scaled_(param: Tensor, factor: float, x: Tensor, scale: float) -> None:
    """param ← factor · param + scale · x, of flat tensors of the same dtype."""
    fits = SMALLEST <= abs(scale) <= LARGEST and abs(factor - 1) <= LARGEST * abs(scale)
    if param.dtype == torch.float32 and fits and _trusted():
        _run(param, factor, x, scale)
        return
    for start, end in spans(param.numel()):
        part = x[start:end]
        if scale != 1:
            part = torch.mul(part, scale, out=buffer("masked", end - start, x.dtype))
        torch.add(part, param[start:end], alpha=factor, out=param[start:end])
