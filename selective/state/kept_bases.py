"""The bases of a group's rotated parameters in a step: as they were in the step before, or made anew.

Their entries are stacked (Note [stacks] in `rotation/stacks.py`) where `capture/rotated_planned.py` can step the group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from selective.parameter import Parameter
from selective.plan.group_plan import GroupPlan
from selective.plan.rotation_plan import RotationPlan
from selective.preconditioner.stacked import LARGEST, fits_in_stacks, most_on_average, steps_in_stacks
from selective.rotation.basis import Basis
from selective.rotation.kept_bases import KeptBases
from selective.rotation.stacks import Form, Stacks, size_of
from selective.sharding.dtensor import is_dtensor, local_of, shard_of
from selective.state.entries import BASIS, BASIS_SKIPPED, BASIS_STEPS
from selective.state.rotation_state import stored_basis
from selective.state.store import StateStore

DEVICES = ("cpu", "cuda")  # those whose memory two storages can share


def bases_of(
    plan: GroupPlan, rotated: list[Parameter], store: StateStore, places: Mapping[Tensor, int]
) -> tuple[list[Basis], Stacks | None]:
    """Return the bases of the rotated parameters that have a gradient, and their stacks.

    There are no stacks if a parameter of the group that has a basis has no gradient now: then each entry is taken by
    itself in this step. A parameter that gets its first gradient joins the stacks.
    """
    rotation = plan.rotation
    assert rotation is not None
    if plan.kept_bases.hold(rotated, (store.table, rotation, places)):
        return plan.kept_bases.bases, plan.kept_bases.stacks
    for parameter in rotated:
        store.get_or_make(plan, parameter)
    members = [p for p in rotation.members if p.tensor in rotation.shapes and p.tensor in store.table]
    _keep(plan, members, store, places)
    kept = plan.kept_bases
    if kept.are_of(rotated):
        return kept.bases, kept.stacks
    basis_of = {id(parameter): basis for parameter, basis in zip(kept.parameters, kept.bases, strict=True)}
    return [basis_of[id(parameter)] for parameter in rotated], None


def _keep(plan: GroupPlan, members: list[Parameter], store: StateStore, places: Mapping[Tensor, int]) -> None:
    """Keep the bases of these parameters, in the stacks that there are if they still hold, or in new ones."""
    rotation, kept = plan.rotation, plan.kept_bases
    assert rotation is not None
    made_of = (store.table, rotation, places)
    if kept.hold(members, made_of):
        return
    tables = [store.table[p.tensor] for p in members]
    stacks = kept.stacks if kept.are_of(members) else None
    if stacks is not None and not (stacks.are_of(tables) and stacks.are_in_place()):
        stacks = None
    if stacks is None or not _can_be_stacked(rotation, members):
        del kept
        stacks = None
        plan.forget_bases()
        if _can_be_stacked(rotation, members):
            forms = [_form(rotation, p.tensor, own) for p, own in zip(members, tables, strict=True)]
            on_ranks = any(is_dtensor(p.tensor) for p in members)
            stacks = Stacks(tables, forms, BASIS, BASIS_STEPS, BASIS_SKIPPED, on_ranks)
    bases = [
        stored_basis(plan, parameter, own, places[parameter.tensor])
        for parameter, own in zip(members, tables, strict=True)
    ]
    plan.kept_bases = KeptBases(members, made_of, bases, stacks)


def _form(rotation: RotationPlan, tensor: Tensor, own: Mapping[str, Tensor]) -> Form:
    whole = rotation.shapes[tensor]
    size = size_of(whole, (entry for name, entry in own.items() if name.startswith(BASIS)))
    return Form(rotation.local_shape(tensor), whole, size, id(shard_of(tensor)))


def _can_be_stacked(rotation: RotationPlan, members: list[Parameter]) -> bool:
    """True if these parameters can be stepped in stacks."""
    return bool(members) and why_not_stacked(rotation, members) is None


def why_not_stacked(rotation: RotationPlan, members: list[Parameter]) -> str | None:
    """Return the reason why these parameters can't be stepped in stacks, in words; None if they can.

    Ranks may differ in it. Of shards, this rank's parts count.
    """
    tensors = [p.tensor for p in members]
    if rotation.capture.way != "fused":
        return "the base steps them by itself"
    if not steps_in_stacks(rotation.preconditioner):
        return f"{type(rotation.preconditioner).__name__} multiplies in bfloat16, or with code of its own"
    if any(t in rotation.gathered for t in tensors):
        return "one is gathered from the ranks"
    if len({shard_of(t) is None for t in tensors}) > 1:
        return "some of them are sharded, and others are not"
    devices = {t.device for t in tensors}
    if len(devices) > 1 or any(device.type not in DEVICES for device in devices):
        return "they are not on one CPU or GPU"
    shapes = [rotation.local_shape(t) for t in tensors]
    if not all(fits_in_stacks(local_of(t).shape, shape) for t, shape in zip(tensors, shapes, strict=True)):
        return f"one has matrices side by side, or one of more than {LARGEST:,} elements"
    most = most_on_average(any(map(is_dtensor, tensors)))
    if sum(map(math.prod, shapes)) > most * len(shapes):
        return f"they have more than {most:,} elements on average"
    return None
