"""Checks that the policies, decays and norms in a checkpoint fit this optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from selective.base.mismatch import CheckpointMismatch
from selective.configured import Configured, kinds_of
from selective.norms import Norm
from selective.parameter import Parameter, is_lazy
from selective.plan.group_plan import GroupPlan
from selective.policies import Decay, Policy
from selective.policies.function import with_live_function
from selective.state.entries import DECAY, MOMENTUM, NORM, POLICY, decode_model
from selective.state.parameter_state import is_of_basis, own_tensors
from selective.state.store import StateStore

C = TypeVar("C", bound=Configured)


def checked_policies(
    plans: Sequence[GroupPlan],
    store: StateStore,
    saved_indices: Sequence[Any],
    wrapper_entries: Mapping[Any, dict[str, Tensor]],
) -> list[Policy]:
    """Return the policies after loading, by group; raise if the checkpoint's is of another kind."""
    policies: list[Policy] = []
    position = 0
    for plan in plans:
        policy, members = plan.policy, plan.params.parameters
        indices = saved_indices[position : position + len(members)]
        position += len(members)
        saved = first_saved([wrapper_entries.get(index, {}) for index in indices], POLICY, Policy, plan.number)
        if saved is not None and kinds_of(saved.model_dump()) != kinds_of(policy.model_dump()):
            raise CheckpointMismatch(
                f"param_groups[{plan.number}] has the policy {policy!r}, the checkpoint was made with {saved!r}",
                "Construct the optimizer with that policy, or load only the base's part "
                "(selective.base_part(state_dict))",
            )
        policy = policy if saved is None else with_live_function(saved, policy)
        policies.append(policy)
        for index, member in zip(indices, members, strict=True):
            if index in wrapper_entries and not is_lazy(member.tensor):  # those are looked at when they have a shape
                _check_entries(plan, store, member, policy, wrapper_entries[index])
    return policies


def checked_decays(
    plans: Sequence[GroupPlan], saved_indices: Sequence[Any], wrapper_entries: Mapping[Any, dict[str, Tensor]]
) -> list[Decay | None]:
    """Return the selective decays after loading, by group; raise if the checkpoint's is of another kind.

    A group that was saved without one keeps what it has here.
    """
    here = [plan.decay for plan in plans]
    return _checked(plans, here, saved_indices, wrapper_entries, (DECAY, "decay", Decay))


def checked_norms(
    plans: Sequence[GroupPlan], saved_indices: Sequence[Any], wrapper_entries: Mapping[Any, dict[str, Tensor]]
) -> list[Norm | None]:
    """Return the rules about norms after loading, by group, as `checked_decays` does it for decays."""
    here = [plan.norm for plan in plans]
    return _checked(plans, here, saved_indices, wrapper_entries, (NORM, "norm", Norm))


def _checked(
    plans: Sequence[GroupPlan],
    here: Sequence[C | None],
    saved_indices: Sequence[Any],
    wrapper_entries: Mapping[Any, dict[str, Tensor]],
    what: tuple[str, str, type[C]],
) -> list[C | None]:
    key, argument, family = what
    found: list[C | None] = []
    indices = iter(saved_indices)
    for plan, own in zip(plans, here, strict=True):
        entries = [wrapper_entries.get(next(indices), {}) for _ in plan.params.parameters]
        saved = first_saved(entries, key, family, plan.number)
        if saved is not None and type(saved) is not type(own):
            raise CheckpointMismatch(
                f"param_groups[{plan.number}] has {argument}={own!r}, the checkpoint was made with {saved!r}",
                f"Construct the optimizer with that {argument}, or load only the base's part "
                "(selective.base_part(state_dict))",
            )
        found.append(own if saved is None else saved)
    return found


def first_saved(entries: Sequence[dict[str, Tensor]], key: str, family: type[C], number: int) -> C | None:
    """Return the policy or preconditioner that a group was saved with; None if none was saved."""
    having = [one[key] for one in entries if key in one]
    if not having:
        return None
    where = f"param_groups[{number}]"
    if not all(torch.equal(one.cpu(), having[0].cpu()) for one in having[1:] if one is not having[0]):
        raise CheckpointMismatch(f"{where}: the checkpoint's parameters differ in their {key!r}")
    return decode_model(having[0], family, where)


def _check_entries(
    plan: GroupPlan, store: StateStore, member: Parameter, policy: Policy, entries: dict[str, Tensor]
) -> None:
    """Refuse entries that this optimizer would not have made.

    Of a parameter whose step is the base's alone, all are taken, and deleted before the next step: older versions saved
    what a policy had left behind when the parameter was moved to another group.
    """
    if not store.keeps(plan, member):
        return
    saved = {k: v for k, v in own_tensors(entries, member.tensor).items() if not is_of_basis(k)}
    wanted = store.fresh_entries(plan, member, policy)
    if (MOMENTUM in saved) != (MOMENTUM in wanted):
        had = "was" if MOMENTUM in saved else "was not"
        raise CheckpointMismatch(f"the checkpoint {had} made with momentum_beta; construct the optimizer the same way")
    saved_form = {key: (tuple(value.shape), value.dtype) for key, value in saved.items()}
    live_form = {key: (tuple(value.shape), value.dtype) for key, value in wanted.items()}
    if saved_form != live_form:
        raise CheckpointMismatch(
            f"the checkpoint's state of parameter {member.name!r} does not fit {policy!r}: found {saved_form}, "
            f"expected {live_form}"
        )
