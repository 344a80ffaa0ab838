"""Whether what a checkpoint has of policies and bases is of this optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from selective.configured import Configured
from selective.mismatch import CheckpointMismatch
from selective.parameter import Parameter
from selective.plan.policy_groups import PreconditionerGroup
from selective.plan.rotation_plan import RotationPlan, layout_of
from selective.preconditioner import Preconditioner
from selective.state.entries import BASIS, BASIS_SHAPE, BASIS_STEPS, decode_model

C = TypeVar("C", bound=Configured)


def first_saved(entries: Sequence[dict[str, Tensor]], key: str, family: type[C], number: int) -> C | None:
    """The policy or preconditioner that a group was saved with; None where nothing was saved of it."""
    having = [one[key] for one in entries if key in one]
    if not having:
        return None
    where = f"param_groups[{number}]"
    if not all(torch.equal(one.cpu(), having[0].cpu()) for one in having[1:] if one is not having[0]):
        raise CheckpointMismatch(f"{where}: the checkpoint's parameters differ in their {key!r}")
    return decode_model(having[0], family, where)


def check_basis(
    entries: dict[str, Tensor],
    saved: Preconditioner,
    rotation: RotationPlan | None,
    group: PreconditionerGroup,
    member: Parameter,
) -> None:
    """Refuse the basis of another preconditioner, of other sides, or of another view of this parameter."""
    ours = group.preconditioner
    shape = None if rotation is None else rotation.shapes.get(member.tensor)
    if not entries or (shape is None and BASIS_STEPS not in entries):
        return
    why = _difference(entries, saved, rotation, shape, member)
    if why is not None:
        raise CheckpointMismatch(
            f"param_groups[{member.group}] has the preconditioner {ours!r} and matrix_view={group.matrix_view!r}, the "
            f"checkpoint was made with {saved!r}: {why}",
            "construct the optimizer with that preconditioner, or load only the base's part "
            "(selective.base_part(state_dict)), whose moments are of that basis",
            long=True,
        )


def advice(preconditioners: Sequence[Preconditioner | None], groups: Sequence[PreconditionerGroup]) -> str | None:
    """What the checkpoint's preconditioners have to say, once: of the first group in which they do."""
    for number, (saved, group) in enumerate(zip(preconditioners, groups, strict=True)):
        said = None if saved is None or group.preconditioner is None else saved.on_load(group.preconditioner)
        if said is not None:
            return f"SelectiveUpdate: the checkpoint's preconditioner {said.format(number=number)}"
    return None


def _difference(
    entries: dict[str, Tensor],
    saved: Preconditioner,
    rotation: RotationPlan | None,
    shape: tuple[int, int, int] | None,
    member: Parameter,
) -> str | None:
    """What is different, in words; None where the basis is ours."""
    who = f"parameter {member.name!r}"
    if rotation is None:
        return f"{who} was rotated"
    if type(saved) is not type(rotation.preconditioner):
        return f"{saved.kind} is another kind than {rotation.preconditioner.kind}"
    if shape is None:
        return f"{who} was rotated, and is left alone here ({rotation.left[member.name]})"
    if BASIS_STEPS not in entries:
        return f"{who} was not rotated"
    there = tuple(entries[BASIS_SHAPE].tolist()) if BASIS_SHAPE in entries else None
    if there != shape:
        return f"{who} was rotated as {there}, here it would be {shape}"
    kept = {key[len(BASIS) :]: value for key, value in entries.items() if key.startswith(BASIS)}
    found = {key: (tuple(value.shape), value.dtype) for key, value in kept.items()}
    wanted = layout_of(rotation.of(member.tensor), shape, member.tensor.device)
    names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    differing = "; ".join(f"{name}: {_said(found.get(name))}, here {_said(wanted.get(name))}" for name in names)
    return f"of {who} it has {differing}" if names else None


def _said(kept: Any) -> str:
    """Shape and dtype of an entry of a basis, as `layout_of` has them."""
    if kept is None:
        return "nothing"
    shape, dtype = kept
    return f"{' x '.join(map(str, shape)) or 'one number'} of {str(dtype).removeprefix('torch.')}"
