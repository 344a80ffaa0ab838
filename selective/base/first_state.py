"""The state that a base makes of a parameter in its first step, found with a clone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.clone import CannotClone, StepFailed, clone_with_stand_ins
from selective.base.lent_gradients import gradient_dtype, set_gradient
from selective.base.probe import constructed_state
from selective.base.step_base import call_step


class FirstState(NamedTuple):
    """The state of one parameter after a clone's first step, and the options of the clone's group."""

    entries: Mapping[str, Any]
    options: Mapping[str, Any]


def first_state(base: Optimizer, group: Mapping[str, Any], param: Tensor, dtype: torch.dtype) -> FirstState | None:
    """Step a clone of `base` on a copy of `param` in `dtype` with a gradient of zeros, and return the state it makes.

    The options are those of `group`. None if the base cannot be cloned or stepped. Call it inside `unnoticed()`.
    """
    stand_in = torch.nn.Parameter(
        param.detach().to(dtype, copy=True)
    )  # with its value: some optimizers keep a copy of it
    grad_dtype = _gradient_dtype(param, dtype)
    try:
        clone = clone_with_stand_ins(base, [[stand_in]], {"lr": 0.0, "weight_decay": 0.0}, groups=[group])
        try:
            _step_on_zeros(clone, stand_in, grad_dtype)
        except StepFailed as error:  # a KeyError: some constructors make the state, and a clone has none
            if not isinstance(error.__cause__, KeyError):
                raise
            clone.state.update(constructed_state(clone))
            _step_on_zeros(clone, stand_in, grad_dtype)
    except (CannotClone, StepFailed):
        return None
    return FirstState(next(iter(clone.state.values()), {}), clone.param_groups[0])


def _gradient_dtype(param: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the gradient with which `param` is stepped in `dtype`: Note [gradients of another dtype].

    If a copy in another dtype is stepped, its gradient is in that dtype too.
    """
    if dtype != param.dtype:
        return dtype
    return param.grad.dtype if param.grad is not None else gradient_dtype(param) or dtype


def _step_on_zeros(clone: Optimizer, param: torch.nn.Parameter, grad_dtype: torch.dtype) -> None:
    set_gradient(param, torch.zeros_like(param, dtype=grad_dtype))
    try:
        call_step(clone)
    except Exception as error:  # broad: the step of an unknown class may raise anything
        raise StepFailed from error
