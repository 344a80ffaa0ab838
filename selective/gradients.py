"""Step 2: looking at the gradients before anything moves."""

from __future__ import annotations

from typing import Literal

import torch

from selective.capture.base import Parameter
from selective.groups import PolicyGroup
from selective.members import Members
from selective.policies import Dense
from selective.staging import Stage

OnNonfinite = Literal["ignore", "skip", "raise"]


def check_gradients(
    policy_groups: list[PolicyGroup], groups: list[Members], stages: list[Stage | None], present: list[list[Parameter]]
) -> None:
    """Refuse sparse and complex gradients where a policy or a rotation has to look at them, by the parameter's name."""
    for policy_group, members, stage, parameters in zip(policy_groups, groups, stages, present, strict=True):
        if not (members.has_sparse or members.has_complex):
            continue
        dense = isinstance(policy_group.policy, Dense)  # handed to the base as they are
        for parameter in parameters:
            rotated = stage is not None and parameter.tensor in stage.shapes
            if rotated or not dense:
                _check_gradient(parameter, "policy and preconditioner" if rotated else "policy")


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


def nonfinite_gradient(groups: list[list[Parameter]]) -> str | None:
    """The name of the first of these whose gradient holds NaN or infinity. One synchronisation with a GPU."""
    present = [p for parameters in groups for p in parameters]
    if not present:
        return None
    # the largest |g| is finite where all are: one number a tensor, without a mask of the tensor's size
    flags = [torch.linalg.vector_norm(_values(p), ord=float("inf")).isfinite() for p in present]
    finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    return next((p.name for p, ok in zip(present, finite, strict=True) if not ok), None)


def _values(parameter: Parameter) -> torch.Tensor:
    grad = parameter.tensor.grad
    assert grad is not None
    values = grad.coalesce().values() if grad.is_sparse else grad
    # in its own dtype: float32 would make infinity of a large float64, and lose the imaginary part
    return values if values.numel() else torch.zeros(1, device=values.device)
