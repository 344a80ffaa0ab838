"""Running a policy's own `mask`: the view it gets, what it may return, and how that reaches the parameter."""

from __future__ import annotations

import torch
from torch import Tensor

from selective.capture.job import StepContext
from selective.kernels import spec
from selective.kernels.sharded import Steps, mask_report
from selective.parameter import Parameter
from selective.policies import Policy
from selective.policies.view import StepView, Tensors
from selective.sharding.dtensor import is_dtensor, local_of
from selective.sharding.gathering import part_of, whole_like, whole_of


class PolicyError(RuntimeError):
    """A policy raised, or returned something that is no mask. Parameters are as they were; moments have moved."""


def make_view(
    context: StepContext,
    policy: Policy,
    parameter: Parameter,
    tensors: Tensors,
    state: dict[str, Tensor],
    shard: spec.Shard | None = None,
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
        shard=shard,
    )


def sees_whole(policy: Policy, shard: spec.Shard | None) -> bool:
    """Whether the policy's own code has to see the whole of a parameter of which this shard is here.

    The same on all ranks: by which dimensions are sharded, not by what happens to be here.
    """
    return shard is None or policy.scope == "tensor" or (policy.scope == "row" and shard.cut > 0)


def masked_step(
    context: StepContext, policy: Policy, parameter: Parameter, tensors: Tensors, shard: spec.Shard | None
) -> Tensor | None:
    """The mask of one parameter, or of the part of it that is here; None where the parameter is empty.

    `tensors` are what is here. Where the policy has to see more, they are gathered, as far as it reads them. On shards
    it is called where they are empty, too: it may ask for means, which take all ranks.
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
    """The mask of a shard by itself; what is reported of it takes all of them."""
    if shard.numel == 0:
        return None
    mask, report, update = run_mask(context, policy, parameter, tensors, None, shard), context.report, tensors.update
    if report is not None:
        assert update is not None
        part = mask_report(mask, update.clone(), tensors.grad, shard)
        steps = [Steps(shard.group, update.device, part, [0])]
        context.exchange.add(steps, 1, lambda sums: report.add_all([parameter.name], sums or []))
    return mask


def _gathered(tensors: Tensors, needs: frozenset[str], param: Tensor, reported: bool) -> Tensors:
    """The whole tensors of those that are read, and of the update and the gradient where a report is made of them."""
    found = {
        name: whole_like(getattr(tensors, name), param)
        for name in ("update", "grad", "momentum", "previous_momentum")
        if name in needs or (reported and name in ("update", "grad"))
    }
    start = tensors.param
    whole = whole_like(start, param) if "param" in needs else start.new_empty(()).expand(param.shape)
    assert whole is not None
    return Tensors(whole, **found, lookahead=tensors.lookahead)


def run_mask(
    context: StepContext,
    policy: Policy,
    parameter: Parameter,
    tensors: Tensors,
    gathered: spec.Shard | None = None,
    shard: spec.Shard | None = None,
) -> Tensor:
    """Call the policy, check what it returns, keep its state; the mask as a float tensor that broadcasts to it.

    `gathered`: the tensors are the whole of what this shard is a part of; `shard`: they are this part.
    """
    state = context.own_state(parameter, policy)
    seen = {key: local_of(value) if gathered is None else whole_of(value) for key, value in state.items()}
    view = make_view(context, policy, parameter, tensors, dict(seen), shard)
    result = policy.mask(view)
    mask, new_state = result if isinstance(result, tuple) else (result, None)
    mask = _checked_mask(policy, parameter, mask, view)
    if new_state is not None:
        _check_state(policy, parameter, seen, new_state)
        for key, value in new_state.items():
            if value is not seen[key] or is_dtensor(state[key]):
                part = part_of(value.detach(), gathered if is_dtensor(state[key]) else None)
                local_of(state[key]).copy_(part)
    return mask


def _checked_mask(policy: Policy, parameter: Parameter, mask: object, view: StepView) -> Tensor:
    who, where = type(policy).__name__, f"parameter {parameter.name!r}"
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
