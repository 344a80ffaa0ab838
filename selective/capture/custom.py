"""Running a policy's own `mask`: the view it gets, what it may return, and how that reaches the parameter."""

from __future__ import annotations

import torch
from torch import Tensor

from selective.capture.base import Parameter, StepContext
from selective.policies import Policy
from selective.view import StepView, Tensors


class PolicyError(RuntimeError):
    """A policy raised, or returned something that is no mask. Parameters are as they were; moments have moved."""


def make_view(
    context: StepContext, policy: Policy, parameter: Parameter, tensors: Tensors, state: dict[str, Tensor]
) -> StepView:
    """The view of one parameter's step for `policy`."""
    return StepView(
        tensors,
        reads=policy.needs(),
        who=type(policy).__name__,
        name=parameter.name,
        draw=context.draw,
        address=parameter.address,
        state=state,
    )


def run_mask(context: StepContext, policy: Policy, parameter: Parameter, tensors: Tensors) -> Tensor:
    """Call the policy, check what it returns, keep its state; the mask as a float tensor that broadcasts to it."""
    state = context.own_state(parameter, policy)
    view = make_view(context, policy, parameter, tensors, dict(state))
    result = policy.mask(view)
    mask, new_state = result if isinstance(result, tuple) else (result, None)
    mask = _checked_mask(policy, parameter, mask, view)
    if new_state is not None:
        _store_state(policy, parameter, state, new_state)
    return mask


def _checked_mask(policy: Policy, parameter: Parameter, mask: object, view: StepView) -> Tensor:
    who, where = type(policy).__name__, f"parameter {parameter.name!r}"
    if not isinstance(mask, Tensor):
        raise TypeError(f"{who}: mask() returned {type(mask).__name__} for {where}; return a bool or float tensor")
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(f"{who}: mask() returned dtype {mask.dtype} for {where}; return a bool or floating tensor")
    shape = parameter.tensor.shape
    try:
        fits = torch.broadcast_shapes(mask.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{who}: mask() returned shape {tuple(mask.shape)} for {where} of shape {tuple(shape)}; a mask must "
            f"broadcast to the parameter"
        )
    if mask.device != parameter.tensor.device:
        raise ValueError(f"{who}: mask() returned a tensor on {mask.device}, {where} is on {parameter.tensor.device}")
    return mask.detach().to(view.dtype)


def _store_state(policy: Policy, parameter: Parameter, state: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    who = type(policy).__name__
    if new.keys() != state.keys():
        raise ValueError(
            f"{who}: mask() returned state {sorted(new)} for parameter {parameter.name!r}, init_state made "
            f"{sorted(state)}; checkpoints need the same entries in every step"
        )
    for key, value in new.items():
        if not isinstance(value, Tensor) or value.shape != state[key].shape or value.dtype != state[key].dtype:
            raise ValueError(
                f"{who}: state {key!r} of parameter {parameter.name!r} must stay a tensor of shape "
                f"{tuple(state[key].shape)} and dtype {state[key].dtype}"
            )
    for key, value in new.items():
        if value is not state[key]:
            state[key].copy_(value.detach())
