"""Loading a checkpoint: first everything is checked, then everything is written, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from selective.base.mismatch import CheckpointMismatch
from selective.checkpoint.frame import check_group_sizes, step_and_seed_of
from selective.checkpoint.matches_base import check_base
from selective.checkpoint.matches_basis import checked_preconditioners, first_warning
from selective.checkpoint.matches_policies import checked_decays, checked_norms, checked_policies
from selective.checkpoint.rollback import rollback
from selective.kernels.lasting import lasting
from selective.norms import Norm
from selective.plan.groups import Groups
from selective.plan.oversized import oversized_as_saved
from selective.policies import Decay, Policy
from selective.preconditioner import Preconditioner
from selective.sharding.dtensor import is_dtensor
from selective.sharding.gathering import cut_like
from selective.state.entries import BASIS_STEPS, POLICY, SEED, STEP, base_part, decode_note, own_part, restore_dtypes
from selective.state.parameter_state import own_tensors
from selective.state.rotation_state import fresh_basis, place_loaded_bases, rotate_moments_into
from selective.state.store import StateStore, follow_changes
from selective.step_count import StepCount


def load(checkpoint: dict[str, Any], base: Optimizer, groups: Groups, store: StateStore, count: StepCount) -> list[str]:
    """Load all of a checkpoint whose structure `checked_frame` accepted, or nothing. Return the warnings.

    What can be known beforehand is checked before anything is loaded; where the base refuses it later, all is put back.
    """
    follow_changes(groups, store)
    check_group_sizes(checkpoint, base.param_groups)
    saved_indices = [index for group in checkpoint["param_groups"] for index in group["params"]]
    wrapper_entries = own_part(checkpoint)
    numbers = step_and_seed_of(wrapper_entries, saved_indices)
    policies = checked_policies(groups.plans, store, saved_indices, wrapper_entries)
    decays = checked_decays(groups.plans, saved_indices, wrapper_entries)
    norms = checked_norms(groups.plans, saved_indices, wrapper_entries)
    preconditioners = checked_preconditioners(groups.plans, saved_indices, wrapper_entries)
    base_entries = _cut(base, saved_indices, base_part(checkpoint))
    base_classes = {decode_note(entries[POLICY]) for entries in wrapper_entries.values()} - {""}
    check_base(base, groups.plans, base_entries, base_classes, wrapper_entries)
    warnings = [first_warning(preconditioners, groups.plans)]
    oversized_before = oversized_as_saved(groups.plans)
    with rollback(base, groups, store, count, _cant_be_loaded):
        _load_base(base, saved_indices, base_entries)
        _load_policies(groups, policies, decays, norms, preconditioners)
        params = (p for group in base.param_groups for p in group["params"])
        store.table = {
            p: own_tensors(wrapper_entries[i], p)
            for i, p in zip(saved_indices, params, strict=True)
            if i in wrapper_entries
        }
        count.set(steps=numbers.get(STEP, 0), seed=numbers.get(SEED))
        follow_changes(groups, store)
        place_loaded_bases(groups.plans, store.table)
        _make_missing_bases(groups, store)
    oversized = oversized_as_saved(groups.plans)
    if oversized != oversized_before:  # else the user has asked for it, and was warned
        warnings.append(oversized)
    return [warning for warning in warnings if warning is not None]


def _cant_be_loaded(reason: str) -> CheckpointMismatch:
    return CheckpointMismatch(f"the checkpoint can't be loaded ({reason})")


def _cut(base: Optimizer, saved_indices: Sequence[Any], base_entries: dict[str, Any]) -> dict[str, Any]:
    """Return the base's part of a checkpoint with the whole tensors of sharded parameters cut to this rank's parts."""
    params = dict(zip(saved_indices, (p for group in base.param_groups for p in group["params"]), strict=True))
    if not any(map(is_dtensor, params.values())):
        return base_entries
    state = {
        index: {k: cut_like(v, params[index]) if isinstance(v, Tensor) else v for k, v in entries.items()}
        for index, entries in base_entries["state"].items()
        if index in params
    }
    return {**base_entries, "state": state}


def _load_base(base: Optimizer, saved_indices: Sequence[Any], base_entries: dict[str, Any]) -> None:
    before = [dict(group) for group in base.param_groups]
    base.load_state_dict(base_entries)
    for number, (old, new) in enumerate(zip(before, base.param_groups, strict=True)):
        missing = [key for key in old if key in base.defaults and key not in new]
        if missing:  # only now: the base may know how to read older checkpoints of its own
            raise CheckpointMismatch(
                f"the checkpoint is not of {type(base).__name__}: its param_groups[{number}] has no "
                f"{', '.join(map(repr, missing))}"
            )
    params = [p for group in base.param_groups for p in group["params"]]
    for index, p in zip(saved_indices, params, strict=True):
        if index in base_entries["state"]:
            restore_dtypes(base.state[p], base_entries["state"][index])


def _load_policies(
    groups: Groups,
    policies: Sequence[Policy],
    decays: Sequence[Decay | None],
    norms: Sequence[Norm | None],
    preconditioners: Sequence[Preconditioner | None],
) -> None:
    rows = zip(groups.plans, policies, decays, norms, preconditioners, strict=True)
    for plan, policy, decay, norm, preconditioner in rows:
        own = plan.policy_group
        own.policy, own.decaying.decay, own.norming.norm = policy, decay, norm
        if preconditioner is not None:
            plan.preconditioning.load(preconditioner)
        plan.look_anew()


def _make_missing_bases(groups: Groups, store: StateStore) -> None:
    """Make a fresh basis for each rotated parameter that the checkpoint has entries but no basis for.

    Its moments are rotated into that basis.
    """
    for plan in groups.plans:
        for parameter in plan.params.parameters:
            own = store.table.get(parameter.tensor)
            if own is not None and BASIS_STEPS not in own and plan.rotated_as(parameter) is not None:
                with lasting():
                    own.update(fresh_basis(plan, parameter))
                rotate_moments_into(store.base, plan, parameter, own)
