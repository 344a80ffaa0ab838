"""Checks that the rotations in a checkpoint fit this optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from selective.base.mismatch import CheckpointMismatch
from selective.checkpoint.matches_policies import first_saved
from selective.parameter import Parameter, is_lazy
from selective.plan.group_plan import GroupPlan
from selective.plan.rotation_plan import RotationPlan, basis_form_of
from selective.preconditioner import Preconditioner
from selective.state.entries import BASIS, BASIS_SHAPE, BASIS_STEPS, PRECONDITIONER


def checked_preconditioners(
    plans: Sequence[GroupPlan], saved_indices: Sequence[Any], wrapper_entries: Mapping[Any, dict[str, Tensor]]
) -> list[Preconditioner | None]:
    """Return the saved preconditioner of each group, None for a group without; raise if a basis does not fit."""
    preconditioners: list[Preconditioner | None] = []
    indices = iter(saved_indices)
    for plan in plans:
        members = plan.params.parameters
        entries = [wrapper_entries.get(next(indices), {}) for _ in members]
        saved = first_saved(entries, PRECONDITIONER, Preconditioner, plan.number)
        preconditioners.append(saved)
        if saved is None:
            continue
        rotation = _with_limits_of(saved, plan.rotation)
        for member, own in zip(members, entries, strict=True):
            if not is_lazy(member.tensor):  # those are looked at when they have a shape
                _check_basis(own, saved, plan, rotation, member)
    return preconditioners


def _check_basis(
    entries: dict[str, Tensor],
    saved: Preconditioner,
    plan: GroupPlan,
    rotation: RotationPlan | None,
    member: Parameter,
) -> None:
    """Refuse the basis of another preconditioner, of other sides, or of another view of this parameter.

    `rotation` is the plan of the group, with the checkpoint's limits.
    """
    group = plan.preconditioning
    shape = None if rotation is None else rotation.shapes.get(member.tensor)
    if not entries or (shape is None and BASIS_STEPS not in entries):
        return
    why = _difference(entries, saved, rotation, shape, member)
    if why is not None:
        raise CheckpointMismatch(
            f"param_groups[{member.group}] has the preconditioner {group.preconditioner!r} and "
            f"matrix_view={group.matrix_view!r}, the checkpoint was made with {saved!r}: {why}",
            "construct the optimizer with that preconditioner, or load only the base's part "
            "(selective.base_part(state_dict)), whose moments are of that basis",
            long=True,
        )


def _with_limits_of(saved: Preconditioner, rotation: RotationPlan | None) -> RotationPlan | None:
    """Return the rotation plan with those options of `saved` that decide which matrices are rotated."""
    if rotation is None or type(saved) is not type(rotation.preconditioner):
        return rotation
    preconditioner = rotation.preconditioner.with_limits_of(saved)
    return rotation if preconditioner is rotation.preconditioner else rotation.with_preconditioner(preconditioner)


def first_warning(preconditioners: Sequence[Preconditioner | None], plans: Sequence[GroupPlan]) -> str | None:
    """Return the first warning that a saved preconditioner gives (`on_load`); None if none gives one."""
    for saved, plan in zip(preconditioners, plans, strict=True):
        here = plan.preconditioning.preconditioner
        said = None if saved is None or here is None else saved.on_load(here)
        if said is not None:
            return f"SelectiveUpdate: the checkpoint's preconditioner {said.format(number=plan.number)}"
    return None


def _difference(
    entries: dict[str, Tensor],
    saved: Preconditioner,
    rotation: RotationPlan | None,
    shape: tuple[int, int, int] | None,
    member: Parameter,
) -> str | None:
    """Return the difference in words; None if the basis fits."""
    who = f"parameter {member.name!r}"
    if rotation is None:
        return f"{who} was rotated"
    if type(saved) is not type(rotation.preconditioner):
        return f"{saved.kind} is another kind than {rotation.preconditioner.kind}"
    if shape is None:
        return f"{who} was rotated, and is left alone here ({rotation.reasons_not_rotated[member.name]})"
    if BASIS_STEPS not in entries:
        return f"{who} was not rotated"
    there = tuple(entries[BASIS_SHAPE].tolist()) if BASIS_SHAPE in entries else None
    if there != shape:
        return f"{who} was rotated as {there}, here it would be {shape}"
    kept = {key[len(BASIS) :]: value for key, value in entries.items() if key.startswith(BASIS)}
    found = {key: (tuple(value.shape), value.dtype) for key, value in kept.items()}
    wanted = basis_form_of(rotation.preconditioner_for(member.tensor), shape, member.tensor.device)
    names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    differing = "; ".join(f"{name}: {_said(found.get(name))}, here {_said(wanted.get(name))}" for name in names)
    return f"of {who} it has {differing}" if names else None


def _said(kept: Any) -> str:
    """Shape and dtype of an entry of a basis, as `basis_form_of` has them."""
    if kept is None:
        return "nothing"
    shape, dtype = kept
    return f"{' x '.join(map(str, shape)) or 'one number'} of {str(dtype).removeprefix('torch.')}"
