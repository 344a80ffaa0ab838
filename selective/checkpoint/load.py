"""Loading a checkpoint: first everything is checked, then everything is written, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from selective.base.mismatch import CheckpointMismatch
from selective.checkpoint.frame import check_entries, check_layout
from selective.checkpoint.matches_base import check_base
from selective.checkpoint.matches_basis import advice, checked_preconditioners
from selective.checkpoint.matches_policies import checked_policies
from selective.checkpoint.rollback import rollback
from selective.kernels.lasting import lasting
from selective.plan.groups import Groups
from selective.policies import Policy
from selective.preconditioner import Preconditioner
from selective.sharding.dtensor import is_dtensor
from selective.sharding.gathering import cut_like
from selective.state.entries import BASIS_STEPS, POLICY, SEED, STEP, base_part, decode_note, own_part, restore_dtypes
from selective.state.parameter_state import own_tensors
from selective.state.rotation_state import bring_home, enter_basis, fresh_basis
from selective.state.store import StateStore, refresh
from selective.step_count import StepCount


def load(
    checkpoint: dict[str, Any], base: Optimizer, groups: Groups, store: StateStore, count: StepCount
) -> str | None:
    """Load all of a checkpoint whose structure `checked_frame` accepted, or nothing. Return a warning, or None.

    What can be known beforehand is checked before anything is loaded; where the base refuses it later, all is put back.
    """
    refresh(groups, store)
    check_layout(checkpoint, base.param_groups)
    order = [index for group in checkpoint["param_groups"] for index in group["params"]]
    ours = own_part(checkpoint)
    numbers = check_entries(ours, order)
    policies = checked_policies(groups.plans, store, order, ours)
    preconditioners = checked_preconditioners(groups.plans, order, ours)
    theirs = _cut(base, order, base_part(checkpoint))
    names = {decode_note(entries[POLICY]) for entries in ours.values()} - {""}
    check_base(base, groups.plans, theirs, names, ours)
    to_say = advice(preconditioners, groups.plans)
    with rollback(base, groups, store, count, _cant_be_loaded):
        _load_base(base, order, theirs)
        _load_policies(groups, policies, preconditioners)
        params = (p for group in base.param_groups for p in group["params"])
        store.table = {p: own_tensors(ours[i], p) for i, p in zip(order, params, strict=True) if i in ours}
        count.set(steps=numbers.get(STEP, 0), seed=numbers.get(SEED))
        refresh(groups, store)
        bring_home(groups.plans, store.table)
        _make_missing_bases(groups, store)
    return to_say


def _cant_be_loaded(reason: str) -> CheckpointMismatch:
    return CheckpointMismatch(f"the checkpoint can't be loaded ({reason})")


def _cut(base: Optimizer, order: Sequence[Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Return the base's part of a checkpoint with the whole tensors of sharded parameters cut to this rank's parts."""
    params = dict(zip(order, (p for group in base.param_groups for p in group["params"]), strict=True))
    if not any(map(is_dtensor, params.values())):
        return theirs
    state = {
        index: {k: cut_like(v, params[index]) if isinstance(v, Tensor) else v for k, v in entries.items()}
        for index, entries in theirs["state"].items()
        if index in params
    }
    return {**theirs, "state": state}


def _load_base(base: Optimizer, order: Sequence[Any], theirs: dict[str, Any]) -> None:
    before = [dict(group) for group in base.param_groups]
    base.load_state_dict(theirs)
    for number, (old, new) in enumerate(zip(before, base.param_groups, strict=True)):
        missing = [key for key in old if key in base.defaults and key not in new]
        if missing:  # only now: the base may know how to read older checkpoints of its own
            raise CheckpointMismatch(
                f"the checkpoint is not of {type(base).__name__}: its param_groups[{number}] has no "
                f"{', '.join(map(repr, missing))}"
            )
    params = [p for group in base.param_groups for p in group["params"]]
    for index, p in zip(order, params, strict=True):
        if index in theirs["state"]:
            restore_dtypes(base.state[p], theirs["state"][index])


def _load_policies(
    groups: Groups, policies: Sequence[Policy], preconditioners: Sequence[Preconditioner | None]
) -> None:
    for plan, policy, preconditioner in zip(groups.plans, policies, preconditioners, strict=True):
        plan.policy_group.policy = policy
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
                enter_basis(store.base, plan, parameter, own)
