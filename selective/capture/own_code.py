"""Calls of a policy's own `mask`: making its view, checking its result, and keeping its state."""

from __future__ import annotations

import torch
from torch import Tensor

from selective.capture.job import StepContext
from selective.kernels import spec
from selective.kernels.sharded import RunningPart, mask_report
from selective.parameter import Parameter
from selective.policies import Policy
from selective.policies.view import TENSORS, StepView, Tensors
from selective.sharding.dtensor import is_dtensor, local_of
from selective.sharding.gathering import part_of, whole_like, whole_of


class PolicyError(RuntimeError):
    """Raised if a policy raises, or returns something that is not a mask.

    The parameters have their values from before the step; the base's moments have moved.
    """


def make_view(
    context: StepContext,
    policy: Policy,
    parameter: Parameter,
    tensors: Tensors,
    state: dict[str, Tensor],
    shard: spec.Shard | None = None,
) -> StepView:
    """Return the view of one parameter's step for `policy`."""
    return StepView(
        tensors,
        reads=policy.needs(),
        who=policy.code_name(),
        name=parameter.name,
        draw=context.draw,
        address=parameter.address,
        state=state,
        shard=shard,
    )


def sees_whole(policy: Policy, shard: spec.Shard | None) -> bool:
    """True if the policy's own code has to see the whole parameter, of which `shard` is this rank's part.

    The answer is the same on all ranks: it depends on the dimensions that are sharded, not on this rank's part.
    """
    return shard is None or policy.scope == "tensor" or (policy.scope == "row" and shard.cut > 0)


def masked_step(
    context: StepContext, policy: Policy, parameter: Parameter, tensors: Tensors, shard: spec.Shard | None
) -> Tensor | None:
    """Return the mask of this rank's part of a parameter; None if the whole parameter is empty.

    `tensors` are this rank's parts. If the policy has to see whole tensors, those that it reads are gathered. The
    policy is called even if this rank's part is empty: it may ask for means, to which all ranks contribute.
    """
    if shard is not None and not sees_whole(policy, shard):
        return _masked_shard(context, policy, parameter, tensors, shard)
    report = context.report
    seen = tensors if shard is None else _gathered(tensors, policy.needs(), parameter.tensor, report is not None)
    if seen.param.numel() == 0:
        return None
    mask = run_mask(context, policy, parameter, seen, shard)
    if report is not None:
        assert seen.update is not None
        report.add_masked(parameter.name, mask, seen.update, seen.grad)
    return part_of(mask, shard)


def _masked_shard(
    context: StepContext, policy: Policy, parameter: Parameter, tensors: Tensors, shard: spec.Shard
) -> Tensor | None:
    """Return the mask of this shard alone, and add its part of the statistics to the exchange between ranks."""
    if shard.numel == 0:
        return None
    mask, report, update = run_mask(context, policy, parameter, tensors, None, shard), context.report, tensors.update
    if report is not None:
        assert update is not None
        part = mask_report(mask, update.clone(), tensors.grad, shard)
        steps = [RunningPart(shard.group, update.device, part, [0])]
        context.exchange.add(steps, 1, lambda sums: report.add_all([parameter.name], sums or []))
    return mask


def _gathered(tensors: Tensors, needs: frozenset[str], param: Tensor, reported: bool) -> Tensors:
    """Gather the tensors that the policy reads, and with `reported` also the update and the gradient."""
    gathered = {
        name: whole_like(getattr(tensors, name), param)
        for name in ("update", "grad", "momentum", "previous_momentum")
        if name in needs or (reported and name in ("update", "grad"))
    }
    start = tensors.param
    whole = whole_like(start, param) if "param" in needs else start.new_empty(()).expand(param.shape)
    assert whole is not None
    return Tensors(whole, **gathered, lookahead=tensors.lookahead)


def run_mask(
    context: StepContext,
    policy: Policy,
    parameter: Parameter,
    tensors: Tensors,
    gathered: spec.Shard | None = None,
    shard: spec.Shard | None = None,
) -> Tensor:
    """Call the policy, check its result and keep its state; return the mask as a float tensor that broadcasts.

    With `gathered`, `tensors` are whole tensors, and `gathered` is this rank's shard of them. With `shard`, `tensors`
    are this shard.
    """
    state = context.own_state(parameter)
    seen = {key: local_of(value) if gathered is None else whole_of(value) for key, value in state.items()}
    view = make_view(context, policy, parameter, tensors, dict(seen), shard)
    versions = _versions(tensors)
    result = policy.mask(view)
    if versions != _versions(tensors):
        raise _wrote_on_view(policy, parameter, tensors, versions)
    mask, new_state = result if isinstance(result, tuple) else (result, None)
    mask = _checked_mask(policy, parameter, mask, view)
    if new_state is not None:
        _check_state(policy, parameter, seen, new_state)
        for key, value in new_state.items():
            if value is not seen[key] or is_dtensor(state[key]):
                part = part_of(value.detach(), gathered if is_dtensor(state[key]) else None)
                local_of(state[key]).copy_(part)
    return mask


def _versions(tensors: Tensors) -> list[int]:
    """The version counter of each tensor of a view, which torch moves on with each write in place."""
    named = (getattr(tensors, name) for name in TENSORS)
    return [-1 if tensor is None or tensor.is_inference() else tensor._version for tensor in named]


def _wrote_on_view(policy: Policy, parameter: Parameter, tensors: Tensors, before: list[int]) -> ValueError:
    """The error about a policy that wrote on a tensor of its view."""
    changed = zip(TENSORS, before, _versions(tensors), strict=True)
    name = next(name for name, old, new in changed if old != new)
    return ValueError(
        f"{policy.code_name()}: mask() wrote on view.{name} of parameter {parameter.name!r}, which the step still "
        f"needs; compute a new tensor (view.{name} * 2 in the place of view.{name}.mul_(2)), or write on view.{name}"
        f".clone()"
    )


def _checked_mask(policy: Policy, parameter: Parameter, mask: object, view: StepView) -> Tensor:
    """Return a policy's mask in the dtype of the view; refuse it if it is no bool or float tensor that broadcasts."""
    who, where = policy.code_name(), f"parameter {parameter.name!r}"
    if not isinstance(mask, Tensor):
        raise TypeError(f"{who}: mask() returned {type(mask).__name__} for {where}; return a bool or float tensor")
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(f"{who}: mask() returned dtype {mask.dtype} for {where}; return a bool or floating tensor")
    shape = view.shape
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


def _check_state(policy: Policy, parameter: Parameter, state: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    """Refuse a policy's new state if its names, shapes or dtypes differ from those of the old one."""
    who = policy.code_name()
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
