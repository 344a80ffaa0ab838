"""Gradients that parameters have for the time of the base's step, and the return of their own.

Note [gradients of another dtype]: a gradient can have another dtype than its parameter, by `p.grad_dtype` (torch 2.10)
or because `p.data` were exchanged after the backward pass. The base then reads a gradient of that dtype, and makes
some of its state in it. What it gets from us has the dtype that it would have made itself, which `p.grad_dtype` may not
allow: so that is set to None, which allows any, until the parameter has its own gradient again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Lent(NamedTuple):
    """One parameter, its own gradient, the one that it has meanwhile, and the dtype that its gradients must have."""

    param: Tensor
    own: Tensor | None
    given: Tensor | None
    allowed: torch.dtype | None


def gradient_dtype(param: Tensor) -> torch.dtype | None:
    """The dtype that a gradient of this parameter must have; None: any. Before torch 2.10 it is the parameter's."""
    return getattr(param, "grad_dtype", param.dtype)


class LentGradients:
    """The gradients that were lent in one step."""

    def __init__(self) -> None:
        self._lent: list[Lent] = []

    def lend(self, param: Tensor, grad: Tensor | None) -> None:
        """`param.grad = grad` until `give_back`, whatever dtype it has. None: the base skips the parameter."""
        self._lent.append(Lent(param, param.grad, grad, gradient_dtype(param)))
        set_gradient(param, grad)

    def give_back(self) -> None:
        """Each parameter gets its own gradient back, unless the base has cleared the one that was lent."""
        for param, own, given, allowed in reversed(self._lent):
            cleared = given is not None and param.grad is None
            param.grad = None
            if gradient_dtype(param) != allowed and is_said(param):
                param.grad_dtype = allowed
            set_gradient(param, None if cleared else own)
        self._lent = []


def is_said(param: Tensor) -> bool:
    """Whether somebody has set `grad_dtype`: otherwise it is the parameter's dtype, also after that has changed."""
    return gradient_dtype(param) != param.dtype


def set_gradient(param: Tensor, grad: Tensor | None) -> None:
    """`param.grad = grad`, also where another dtype was asked for."""
    if grad is None or gradient_dtype(param) in (None, grad.dtype):
        param.grad = grad
        return
    param.grad = None
    if is_said(param):
        param.grad_dtype = None
        param.grad = grad
        return
    # Nobody has asked for a dtype: `param.data` were exchanged under a gradient. torch compares when it is assigned.
    data = param.data
    try:
        param.data = data.new_zeros((), dtype=grad.dtype).expand(data.shape)
        param.grad = grad
    finally:
        param.data = data
