"""The entries of rotated parameters: the preconditioner's tensors, a count of steps, a count of gradients left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.parameter import Parameter
from selective.plan.group_plan import GroupPlan
from selective.plan.rotation_plan import RotationPlan
from selective.preconditioner import State
from selective.rotation.basis import Basis
from selective.rotation.carry import rotate_existing_moments
from selective.rotation.moments import moments_of
from selective.rotation.refresh_gathered import through_gather
from selective.sharding.collectives import sums_over_ranks
from selective.sharding.dtensor import is_first, shard_of
from selective.state.entries import BASIS, BASIS_SHAPE, BASIS_SKIPPED, BASIS_STEPS
from selective.state.parameter_state import OwnEntries


def fresh_basis(plan: GroupPlan, parameter: Parameter) -> dict[str, Tensor]:
    """Return the entries of a parameter's basis before its first step; {} if it is not rotated."""
    rotated = plan.rotated_as(parameter)
    if rotated is None:
        return {}
    rotation, shape = rotated
    state = rotation.fresh(parameter.tensor)
    if not isinstance(state, dict):
        raise TypeError(
            f"SelectiveUpdate: {type(rotation.preconditioner).__name__}.init_state returned {state!r} for parameter "
            f"{parameter.name!r}, must be a dictionary of tensors; an empty one where nothing is kept"
        )
    for key, value in state.items():
        here = isinstance(value, Tensor) and value.device == parameter.tensor.device
        if not here and not (isinstance(value, Tensor) and value.device.type == "cpu" and value.dim() == 0):
            raise TypeError(
                f"SelectiveUpdate: {type(rotation.preconditioner).__name__}.init_state: {key!r} of parameter "
                f"{parameter.name!r} must be a tensor on {parameter.tensor.device}, or a 0-d one on the CPU"
            )
    entries = {BASIS + key: value.detach() for key, value in state.items()}
    entries[BASIS_STEPS] = torch.zeros((), dtype=torch.int64, device="cpu")
    entries[BASIS_SHAPE] = torch.tensor(shape, dtype=torch.int64, device="cpu")
    entries[BASIS_SKIPPED] = torch.zeros((), dtype=torch.int64, device=parameter.tensor.device)
    return entries


def stored_basis(plan: GroupPlan, parameter: Parameter, own: OwnEntries, place: int) -> Basis:
    """Return the stored basis of a rotated parameter, which is number `place` among all rotated ones."""
    rotated = plan.rotated_as(parameter)
    assert rotated is not None
    rotation, shape = rotated
    p, steps, skipped = parameter.tensor, own[BASIS_STEPS], own[BASIS_SKIPPED]
    here, gathers = rotation.local_shape(p), p in rotation.gathered
    return Basis(here, p.device, _state_in(own), steps, skipped, place, shape, shard_of(p), gathers)


def rotate_moments_into(base: Optimizer, plan: GroupPlan, parameter: Parameter, own: Mapping[str, Tensor]) -> None:
    """Rotate the moments that the base already has into a basis that was just made.

    These are of the parameter's own space if the base has trained alone, or if a plain checkpoint was loaded.
    """
    rotated = plan.rotated_as(parameter)
    if rotated is None or parameter.tensor not in base.state:
        return
    (rotation, whole), p = rotated, parameter.tensor
    moments = moments_of(base, plan.group, rotation.capture.facts)
    state, project = _state_in(own), rotation.preconditioner.project_in

    def change(x: Tensor) -> Tensor:
        return project([state], [x])[0]

    shard = shard_of(p) if p in rotation.gathered else None
    entered = change if shard is None else through_gather(shard, whole, change)
    with torch.no_grad():
        rotate_existing_moments(base, p, moments, rotation.local_shape(p), entered)


def place_loaded_bases(plans: Sequence[GroupPlan], table: Mapping[Tensor, OwnEntries]) -> None:
    """Move the basis tensors of a loaded checkpoint to the devices on which the preconditioner keeps them.

    A checkpoint has whole sums over ranks. The first rank keeps these, the others get zeros.
    """
    devices_by_kind: dict[tuple[object, ...], dict[str, torch.device]] = {}
    for rotation, p, own in _rotated(plans, table):
        if shard_of(p) is not None and not is_first(p):
            own.update({key: torch.zeros_like(own[key]) for key in _parts_in(own, rotation, p)})
        key = (id(rotation.preconditioner_for(p)), rotation.shapes[p], p.device)
        if key not in devices_by_kind:
            devices_by_kind[key] = {BASIS + name: value.device for name, value in rotation.fresh(p).items()}
        own.update({name: own[name].to(device) for name, device in devices_by_kind[key].items() if name in own})


def summed_entries(plans: Sequence[GroupPlan], table: Mapping[Tensor, OwnEntries]) -> dict[Tensor, dict[str, Tensor]]:
    """Add up over ranks the entries of which each rank holds one addend: averages of Grams, the count of skipped steps.

    This is a collective: all ranks of a mesh have to call it.
    """
    parts: list[tuple[Tensor, str, Tensor]] = []
    for rotation, p, own in _rotated(plans, table):
        if shard_of(p) is not None:
            parts += [(p, key, own[key]) for key in _parts_in(own, rotation, p)]
    wholes: dict[Tensor, dict[str, Tensor]] = {}
    sums = sums_over_ranks([value for _, _, value in parts], [shard_of(p) for p, _, _ in parts])
    for (p, key, _), value in zip(parts, sums, strict=True):
        wholes.setdefault(p, {})[key] = value
    return wholes


def _rotated(
    plans: Sequence[GroupPlan], table: Mapping[Tensor, OwnEntries]
) -> Iterator[tuple[RotationPlan, Tensor, OwnEntries]]:
    """Iterate over the rotated parameters that have a stored basis."""
    for rotation in (plan.rotation for plan in plans if plan.rotation is not None):
        for p in rotation.shapes:
            own = table.get(p)
            if own is not None and BASIS_STEPS in own:
                yield rotation, p, own


def _state_in(entries: Mapping[str, Tensor]) -> State:
    """The preconditioner's own tensors, by its names."""
    return {key[len(BASIS) :]: value for key, value in entries.items() if key.startswith(BASIS)}


def _parts_in(own: dict[str, Tensor], rotation: RotationPlan, param: Tensor) -> list[str]:
    """Names of the entries of a sharded matrix that are parts of sums over ranks."""
    if param in rotation.gathered:
        return [BASIS_SKIPPED]
    names = [key for key in own if key.startswith(BASIS) and rotation.preconditioner.is_part(key[len(BASIS) :])]
    return [BASIS_SKIPPED, *names]
