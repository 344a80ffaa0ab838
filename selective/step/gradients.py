"""Step 2: checks of the gradients, before anything moves (numbers: docstring of `SelectiveUpdate.step`)."""

from __future__ import annotations

from typing import Any

import torch

from selective.base.hyperparameters import scalar
from selective.parameter import Parameter
from selective.plan.group_plan import GroupPlan
from selective.plan.options import OnNonfinite
from selective.sharding.collectives import seen_by_all
from selective.sharding.dtensor import local_like, local_of
from selective.state.check_before_step import check_gradient_shape

ELSEWHERE = "(of another rank)"


def check_gradients(plans: list[GroupPlan], present: list[list[Parameter]]) -> None:
    """Refuse gradients of another shape than their parameter, and sparse and complex ones, by the parameter's name.

    Where neither a policy nor a rotation has to look at them, sparse and complex ones are handed to the base.
    """
    for plan, parameters in zip(plans, present, strict=True):
        params = plan.params
        if params.has_unfit:
            for parameter in parameters:
                check_gradient_shape(parameter)
        if not (params.has_sparse or params.has_complex):
            continue
        for parameter in parameters:
            if plan.masks_or_rotates(parameter):
                _check_gradient(parameter, " and ".join(_keys_of(plan, parameter)))


def _keys_of(plan: GroupPlan, parameter: Parameter) -> list[str]:
    """The keys of a group that have to be None so that the base alone steps this parameter."""
    keys = [] if plan.steps_alone else ["policy"]
    keys += [] if plan.rotated_as(parameter) is None else ["preconditioner"]
    return keys + (["norm"] if plan.norms is not None and parameter.tensor in plan.norms.shapes else [])


def _check_gradient(parameter: Parameter, key: str) -> None:
    grad = parameter.tensor.grad
    if grad is not None and grad.layout != torch.strided:
        raise ValueError(
            f"SelectiveUpdate: parameter {parameter.name!r} has a sparse gradient; use "
            f"nn.Embedding(sparse=False), or put it into a parameter group with {key} None"
        )
    if parameter.tensor.is_complex():
        raise ValueError(
            f"SelectiveUpdate: parameter {parameter.name!r} is complex; a mask by sign or rank has no meaning "
            f"there. Train torch.view_as_real of it, or put it into a parameter group with policy None"
        )


def has_nonfinite(present: list[list[Parameter]], on_nonfinite: OnNonfinite, step: int) -> bool:
    """True if a gradient is not finite and `on_nonfinite` is "skip"; a FloatingPointError if it is "raise"."""
    where = None if on_nonfinite == "ignore" else nonfinite_gradient(present)
    if where is not None and on_nonfinite == "raise":
        raise FloatingPointError(
            f"SelectiveUpdate: the gradient of parameter {where!r} is not finite in step {step}; nothing has moved. "
            f"Clip or skip (on_nonfinite='skip')"
        )
    return where is not None


def nonfinite_gradient(groups: list[list[Parameter]]) -> str | None:
    """Return the name of the first of these whose gradient holds NaN or infinity. One synchronisation with a GPU.

    Ranks that share tensors find the same: one small all-reduce for each mesh.
    """
    present = [p for parameters in groups for p in parameters]
    if not present:
        return None
    # the largest |g| is finite where all are: one number a tensor, without a mask of the tensor's size
    flags = [~torch.linalg.vector_norm(_values(p), ord=float("inf")).isfinite() for p in present]
    bad = seen_by_all(flags, [p.tensor for p in present])
    return next((name for name, found in zip([*(p.name for p in present), ELSEWHERE], bad, strict=True) if found), None)


def is_initialisation(groups: list[dict[str, Any]]) -> bool:
    """True for torch.distributed.checkpoint's way to make state: learning rate 0 and zero gradients."""
    rates = [group.get("lr") for group in groups]
    if any(r is None or (isinstance(r, torch.Tensor) and r.device.type != "cpu") or scalar(r) != 0.0 for r in rates):
        return False
    tensors = [p for group in groups for p in group["params"] if p.grad is not None]
    return bool(tensors) and not any_nonzero_gradient(tensors)


def any_nonzero_gradient(tensors: list[torch.Tensor]) -> bool:
    """True if any of their gradients has an element that is not 0, here or on a rank that shares tensors with this."""
    flags = [local_of(p.grad).any() for p in tensors if p.grad is not None]
    return any(seen_by_all(flags, [p for p in tensors if p.grad is not None]))


def _values(parameter: Parameter) -> torch.Tensor:
    grad = parameter.tensor.grad
    assert grad is not None
    values = grad.coalesce().values() if grad.is_sparse else local_like(grad, parameter.tensor)
    # in its own dtype: float32 would make infinity of a large float64, and lose the imaginary part
    return values if values.numel() else values.new_zeros(1)
