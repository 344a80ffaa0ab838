"""What a base keeps of a parameter after its first step, seen on a twin: names, dtypes, and options that it decided."""

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
    """A twin's state of one parameter, and the options of its group."""

    entries: Mapping[str, Any]
    options: Mapping[str, Any]


def first_state(base: Optimizer, group: Mapping[str, Any], param: Tensor, dtype: torch.dtype) -> FirstState | None:
    """What `base` makes of a copy of `param` in `dtype`, with the options of `group`, in a step on a gradient of zeros.

    None where the base can't be tried. Inside `unnoticed()`.
    """
    stand_in = torch.nn.Parameter(param.detach().to(dtype, copy=True))  # its value, for bases that keep a copy of it
    grad_dtype = _gradient_dtype(param, dtype)
    try:
        twin = clone_with_stand_ins(base, [[stand_in]], {"lr": 0.0, "weight_decay": 0.0}, groups=[group])
        try:
            _step_on_nothing(twin, stand_in, grad_dtype)
        except StepFailed as error:  # an entry missing: does the constructor fill the state?
            if not isinstance(error.__cause__, KeyError):
                raise
            twin.state.update(constructed_state(twin))
            _step_on_nothing(twin, stand_in, grad_dtype)
    except (CannotClone, StepFailed):
        return None
    return FirstState(next(iter(twin.state.values()), {}), twin.param_groups[0])


def _gradient_dtype(param: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the gradients from which `param` is stepped in `dtype`: Note [gradients of another dtype].

    Where it is stepped as a copy in another dtype, its gradients are made in that, too.
    """
    if dtype != param.dtype:
        return dtype
    return param.grad.dtype if param.grad is not None else gradient_dtype(param) or dtype


def _step_on_nothing(twin: Optimizer, param: torch.nn.Parameter, grad_dtype: torch.dtype) -> None:
    set_gradient(param, torch.zeros_like(param, dtype=grad_dtype))
    try:
        call_step(twin)
    except Exception as error:  # a foreign step may raise anything
        raise StepFailed from error
