"""LentGradients: other gradients in the parameters for the time of the base's step.

Note [gradients of another dtype]: a gradient can have another dtype than its parameter, through `p.grad_dtype` (torch
2.10) or because `p.data` was replaced after the backward pass. The base then reads a gradient of that dtype, and makes
some of its state in it. The gradient that we lend has the dtype of the one that the base would have computed itself.
`p.grad_dtype` may forbid this dtype. So it is set to None, which allows any, until the parameter has its own gradient
again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Lent(NamedTuple):
    """A parameter, its own gradient, the lent one, and the dtype that the parameter prescribes for its gradients."""

    param: Tensor
    own_grad: Tensor | None
    lent_grad: Tensor | None
    allowed: torch.dtype | None


def gradient_dtype(param: Tensor) -> torch.dtype | None:
    """Return the dtype that a gradient of `param` must have; None for any. Before torch 2.10 it is that of `param`."""
    return getattr(param, "grad_dtype", param.dtype)


class LentGradients:
    """The gradients that are lent to parameters in one step."""

    def __init__(self) -> None:
        self._lent: list[Lent] = []

    def lend(self, param: Tensor, grad: Tensor | None) -> None:
        """Set `param.grad = grad`, of any dtype, until `give_back`. With None the base skips the parameter."""
        self._lent.append(Lent(param, param.grad, grad, gradient_dtype(param)))
        set_gradient(param, grad)

    def give_back(self) -> None:
        """Give each parameter its own gradient back; if the base has cleared the lent one, the gradient is None."""
        for param, own_grad, lent_grad, allowed in reversed(self._lent):
            cleared = lent_grad is not None and param.grad is None
            param.grad = None
            if gradient_dtype(param) != allowed and has_own_grad_dtype(param):
                param.grad_dtype = allowed
            set_gradient(param, None if cleared else own_grad)
        self._lent = []


def has_own_grad_dtype(param: Tensor) -> bool:
    """Return True if a user has set `grad_dtype`: otherwise it is always the parameter's dtype."""
    return gradient_dtype(param) != param.dtype


def set_gradient(param: Tensor, grad: Tensor | None) -> None:
    """Set `param.grad = grad`, even if the parameter prescribes another dtype for its gradients."""
    if grad is None or gradient_dtype(param) in (None, grad.dtype):
        param.grad = grad
        return
    param.grad = None
    if has_own_grad_dtype(param):
        param.grad_dtype = None
        param.grad = grad
        return
    # `grad_dtype` was not set, but `param.data` was replaced after the gradient had been made. torch compares dtypes
    # when a gradient is assigned, so the parameter gets data of the gradient's dtype meanwhile.
    data = param.data
    try:
        param.data = data.new_zeros((), dtype=grad.dtype).expand(data.shape)
        param.grad = grad
    finally:
        param.data = data
