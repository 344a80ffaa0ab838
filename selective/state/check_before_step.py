"""Before a step, check that state fits its parameter, in the groups in which either has changed.

Entries of the base that don't fit are refused: only the code that changed the parameter knows how moments are cut or
extended with it. The wrapper's own entries are remade, unless the user has written them. Then they are refused as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.fused_rules import fused_rule
from selective.base.state_entries import state_entries
from selective.parameter import Parameter, is_lazy
from selective.plan.group_plan import GroupPlan
from selective.plan.rotation_plan import RotationPlan, basis_form_of
from selective.preconditioner import Shape
from selective.state.entries import BASIS, BASIS_SHAPE, BASIS_SKIPPED, BASIS_STEPS
from selective.state.parameter_state import OwnEntries, in_dtype, is_of_basis
from selective.state.rotation_state import fresh_basis, rotate_moments_into
from selective.state.store import StateStore

_WAY_OUT = (
    "Cut or extend it with the parameter (opt.state[p][{key!r}] = ...), or delete all of the parameter's state "
    "(del opt.state[p]), and it starts anew"
)


def check_state(plans: Sequence[GroupPlan], store: StateStore) -> None:
    """Make all state fit. Raise a ValueError, before anything has changed, if the base's does not."""
    unchecked = [plan for plan in plans if not plan.params.state_checked]
    for plan in unchecked:
        for parameter in _there(plan):
            check_gradient_shape(parameter)
            if store.keeps(plan, parameter):  # else its step is the base's alone
                _check_base_entries(store.base, plan, parameter)
    if unchecked:
        complete(unchecked, store)
    for plan in unchecked:
        plan.params.state_checked, plan.params.with_entries = True, None
        plan.params.old_shapes.clear()
        plan.params.arrived.clear()


def complete(plans: Sequence[GroupPlan], store: StateStore) -> None:
    """Make the wrapper's missing entries, remake those that no longer fit their parameter, and delete needless ones.

    A parameter that has come from another group loses the state of a policy that it no longer has.
    """
    unchecked = [plan for plan in plans if not plan.params.state_checked]
    stored = [
        (plan, parameter, own)
        for plan in unchecked
        for parameter in _there(plan)
        if (own := store.table.get(parameter.tensor)) is not None
    ]
    for plan, parameter, own in stored:
        _check_space(store, plan, parameter, own)
    for plan, parameter, own in stored:
        _complete(store, plan, parameter, own)
    for plan in unchecked:
        if any(p in store.table for p in plan.params.tensors):  # then a checkpoint has entries of all that have stepped
            store.join_base([plan])


def _check_space(store: StateStore, plan: GroupPlan, parameter: Parameter, own: OwnEntries) -> None:
    """Raise if a parameter was moved out of the space in which its moments were collected."""
    shape, p = _shape_in(own), parameter.tensor
    if shape is None or prod(shape) != p.numel() or p in plan.params.old_shapes or not store.base.state.get(p):
        return  # there is nothing to move, or the user has changed the parameter and its state together
    rotated, now = plan.rotated_as(parameter), "its group here has no preconditioner for it"
    if rotated is not None:
        if p not in plan.params.arrived or own.written or own.removed or shape != tuple(rotated[1]):
            return  # a basis that was loaded may have another form than one that is made here
        rotation, whole = rotated
        wanted = basis_form_of(rotation.preconditioner_for(p), whole, p.device)
        if {BASIS + name for name in wanted} == own.present_basis_form().keys():
            return
        now = f"its group here has {rotation.preconditioner!r}"
    raise ValueError(
        f"SelectiveUpdate: parameter {parameter.name!r} has moments in the space of a preconditioner, and {now}, as if "
        f"it had come from another group: there they would mean nothing. Move it back, or delete all of the "
        f"parameter's state (del opt.state[p]), and it starts anew"
    )


def _check_base_entries(base: Optimizer, plan: GroupPlan, parameter: Parameter) -> None:
    """Raise if entries of the base lack a name that its rule needs, or have another shape than the parameter."""
    p, state = parameter.tensor, base.state.get(parameter.tensor)
    if not state:
        return
    capture = plan.capture_of(parameter)
    rule = fused_rule(base) if capture.way == "fused" else None
    shaped: list[str] = []
    if rule is not None:
        needed, shaped = rule.names(plan.group)
        missing = next((name for name in needed if name not in state), None)
        if missing is not None:
            raise ValueError(
                f"SelectiveUpdate: the state of parameter {parameter.name!r} has {sorted(map(str, state))}, and no "
                f"{missing!r}: {type(base).__name__} can't step it. Write it (opt.state[p][{missing!r}] = "
                f"...), or delete all of the parameter's state (del opt.state[p]), and it starts anew"
            )
        rule.convert(plan.group, p, state)
    was = plan.params.old_shapes.get(p)
    for name, value in state_entries(state):
        if not isinstance(value, Tensor):
            continue
        unfit = value.shape != p.shape and (name in shaped or _is_of(value.shape, was, p.shape))
        if unfit or (name == capture.facts.momentum_key and value.numel() != p.numel()):
            _refuse_shape(parameter, name, value)


def _complete(store: StateStore, plan: GroupPlan, parameter: Parameter, own: OwnEntries) -> None:
    if not store.keeps(plan, parameter):
        store.forget(parameter)
        return
    before = dict(own)
    _complete_entries(store, plan, parameter, own)
    _complete_basis(store, plan, parameter, own)
    if own.keys() != before.keys() or any(own[key] is not value for key, value in before.items()):
        store.mark_replaced()
    own.find_divided([parameter.tensor.shape])
    own.mark_checked()


def _complete_entries(store: StateStore, plan: GroupPlan, parameter: Parameter, own: OwnEntries) -> None:
    """Make the policy's state, the momentum and the residue fit, and delete entries that are not kept any more."""
    fresh = store.fresh_entries(plan, parameter, plan.policy)
    for key in [key for key in own if key not in fresh and not is_of_basis(key)]:
        if key in own.written:
            raise ValueError(
                f"SelectiveUpdate: the state of parameter {parameter.name!r} was given an entry {key!r}, which "
                f"{plan.policy!r} does not keep here. Remove it (del opt.state[p][{key!r}])"
            )
        del own[key]
    for key, like in fresh.items():
        now = own.get(key)
        if now is not None and now.shape != like.shape:
            if key in own.written:
                _refuse_shape(parameter, key, now, like)
            now = None
        own[key] = like if now is None else now.to(like.device, like.dtype)


def _complete_basis(store: StateStore, plan: GroupPlan, parameter: Parameter, own: OwnEntries) -> None:
    """Make the basis fit: one that is incomplete, or of another matrix, is replaced by a fresh one."""
    rotated = plan.rotated_as(parameter)
    if rotated is not None and _has_whole_basis(*rotated, parameter, own):
        return
    there = [key for key in own if is_of_basis(key)]
    if rotated is not None and _shape_in(own) == tuple(rotated[1]) and own.written.intersection(there):
        raise ValueError(
            f"SelectiveUpdate: the state of parameter {parameter.name!r} was given a basis that "
            f"{rotated[0].preconditioner!r} does not keep of {list(rotated[1])}: {sorted(there)}. Give it all entries "
            f"of one, or none (del opt.state[p][{BASIS_SHAPE!r}]), and it starts anew"
        )
    for key in there:
        del own[key]
    if rotated is not None:
        fresh = fresh_basis(plan, parameter)
        rotate_moments_into(store.base, plan, parameter, fresh)  # if it raises, the next step tries again
        own.update(fresh)


def _has_whole_basis(rotation: RotationPlan, shape: Shape, parameter: Parameter, own: OwnEntries) -> bool:
    """True if the stored basis is complete and of a matrix of this shape."""
    if any(key not in own for key in (BASIS_STEPS, BASIS_SKIPPED, BASIS_SHAPE)) or _shape_in(own) != tuple(shape):
        return False
    changed_outside = own.written | own.removed
    if not any(map(is_of_basis, changed_outside)):
        return True  # as we made or loaded it
    kept: dict[str, Any] = {k[len(BASIS) :]: v for k, v in own.items() if k.startswith(BASIS)}
    wanted: Any = basis_form_of(rotation.preconditioner_for(parameter.tensor), shape, parameter.tensor.device)
    for name in kept.keys() & wanted.keys():
        kept[name] = own[BASIS + name] = in_dtype(kept[name], wanted[name][1])
    found = own.present_basis_form()
    return found in (own.basis_form, {BASIS + name: one for name, one in wanted.items()})


def _there(plan: GroupPlan) -> list[Parameter]:
    return [parameter for parameter in plan.params.parameters if not is_lazy(parameter.tensor)]


def _is_of(shape: torch.Size, was: torch.Size | None, now: torch.Size) -> bool:
    """True if an entry's shape follows the parameter's old shape `was`, and not its shape of `now`.

    It does if it is `was`, or if it shares with `was` a side that has changed, as the factors of Adafactor do.
    """
    if was is None or len(shape) == 0:
        return False
    alike = len(shape) == len(was) == len(now)
    return shape == was or (alike and any(s == w != n for s, w, n in zip(shape, was, now, strict=True)))


def check_gradient_shape(parameter: Parameter) -> None:
    """Refuse a gradient that has another shape than its parameter."""
    p = parameter.tensor
    if p.grad is not None and p.grad.shape != p.shape:
        raise ValueError(
            f"SelectiveUpdate: parameter {parameter.name!r} has shape {tuple(p.shape)}, its gradient "
            f"{tuple(p.grad.shape)}: the parameter was changed after the backward pass. Drop the gradient (p.grad = "
            f"None), or change parameters after the step"
        )


def _shape_in(own: OwnEntries) -> tuple[int, ...] | None:
    """Return the shape of the matrix that a stored basis belongs to; None if there is no basis."""
    return tuple(own[BASIS_SHAPE].tolist()) if BASIS_SHAPE in own else None


def _refuse_shape(parameter: Parameter, key: str, value: Tensor, like: Tensor | None = None) -> None:
    expected = parameter.tensor.shape if like is None else like.shape
    raise ValueError(
        f"SelectiveUpdate: parameter {parameter.name!r} has shape {tuple(parameter.tensor.shape)}, and {key!r} of its "
        f"state has {tuple(value.shape)}, must have {tuple(expected)}: they were changed apart from each other. "
        + _WAY_OUT.format(key=key)
    )
