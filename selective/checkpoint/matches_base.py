"""Checks that the base's part of a checkpoint is of this base and of this model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from selective.base.fused_rules import fused_rule
from selective.base.mismatch import CheckpointMismatch
from selective.base.same_class import check_class, check_first_state, check_options
from selective.parameter import Parameter, is_lazy
from selective.plan.group_plan import GroupPlan


def check_base(
    base: Optimizer,
    plans: Sequence[GroupPlan],
    saved: Mapping[str, Any],
    names: Collection[str],
    wrapper_entries: Collection[Any],
) -> None:
    """Refuse what another optimizer or another model has saved.

    Args:
        saved: the base's part of the checkpoint.
        names: those of the classes that it was saved with.
        wrapper_entries: the parameters of which the checkpoint has entries of ours.
    """
    same = [check_class(name, base) for name in sorted(names)]
    is_same = bool(same) and all(same)
    for group, plan in zip(saved["param_groups"], plans, strict=True):
        check_options(base, group)
        _check_all_or_none(plan, group, saved["state"], wrapper_entries)
        members = zip(group["params"], plan.params.parameters, strict=True)
        shaped = [(saved["state"].get(index), member) for index, member in members if not is_lazy(member.tensor)]
        stepped = [(entries, member) for entries, member in shaped if entries]
        for entries, member in stepped:
            _check_moments(base, plan, group, member, entries)
        if stepped and fused_rule(base) is None and not is_same:
            states = {member.tensor: entries for entries, member in stepped}
            check_first_state(base, group, plan.group, states, plan.capture.facts.residue)


def _check_all_or_none(
    plan: GroupPlan, group: dict[str, Any], states: Mapping[Any, Any], wrapper_entries: Collection[Any]
) -> None:
    """Refuse a group of which only some of the parameters that have stepped have entries of ours."""
    stepped = [index for index in group["params"] if states.get(index)]
    lacking = [index for index in stepped if index not in wrapper_entries]
    if not plan.is_dense and 0 < len(lacking) < len(stepped):  # of a dense group only what is rotated has entries
        raise CheckpointMismatch(
            f"the checkpoint has entries of ours for {len(stepped) - len(lacking)} of the {len(stepped)} "
            f"parameters of param_groups[{plan.number}] that have stepped, and none for parameter {lacking[0]}",
            "To load the base's part alone: selective.base_part(state_dict)",
        )


def _check_moments(
    base: Optimizer, plan: GroupPlan, group: dict[str, Any], member: Parameter, entries: dict[str, Any]
) -> None:
    """Refuse moments that are not shaped like their parameter, and of a base that we know, names that it has not."""
    rule, key = fused_rule(base), plan.capture.facts.momentum_key
    keys = [] if key is None else [key]
    if rule is not None:
        keys = rule.checked_moment_names(group, entries, type(base).__name__)
    for key in keys:
        shape = getattr(entries.get(key), "shape", member.tensor.shape)
        if shape != member.tensor.shape:
            raise CheckpointMismatch(
                f"the checkpoint's {key!r} of parameter {member.name!r} has shape {tuple(shape)}, the parameter "
                f"{tuple(member.tensor.shape)}"
            )
