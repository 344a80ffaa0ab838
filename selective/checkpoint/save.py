"""Writing a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from selective.plan.groups import Groups
from selective.state.check_before_step import complete
from selective.state.rotation_state import summed_entries
from selective.state.store import StateStore, follow_changes
from selective.step_count import StepCount


def save(base: Optimizer, groups: Groups, store: StateStore, count: StepCount) -> dict[str, Any]:
    """torch's form, `{"state", "param_groups"}`: the base's own, with our entries under `selective/`."""
    follow_changes(groups, store)  # groups that were added on the base are ours too
    complete(groups.plans, store)
    _check_all_there(base)
    if count.read() and not store.table:  # no masked parameter has had a gradient yet: the count needs a place
        store.make(groups.plans, lambda parameter: parameter.tensor.requires_grad)
    saved = dict(base.state_dict())
    state = {index: dict(entries) for index, entries in saved["state"].items()}
    wholes = summed_entries(groups.plans, store.table)
    for group, plan in zip(saved["param_groups"], groups.plans, strict=True):
        for index, p in zip(group["params"], plan.group["params"], strict=True):
            own = store.table.get(p)
            if own is not None:
                entries = {**store.saved(plan, own), **wholes.get(p, {})}
                state.setdefault(index, {}).update(placed(entries, p))
    saved["state"] = state
    return saved


def placed(entries: Mapping[str, Tensor], param: Tensor) -> dict[str, Tensor]:
    """Return the entries with those that have dimensions on the parameter's device; numbers stay where they are.

    torch's `set_optimizer_state_dict` refuses to load a full state dict if two such tensors are on different devices.
    """
    if param.is_meta:  # which would lose what the bytes say
        return dict(entries)
    return {key: value.to(param.device) if value.dim() > 0 else value for key, value in entries.items()}


def _check_all_there(base: Optimizer) -> None:
    """Refuse to save what belongs to a parameter that no group has: torch would name a number that nobody knows."""
    there = {p for group in base.param_groups for p in group["params"]}
    gone = [p for p in base.state if isinstance(p, Tensor) and p not in there]
    if gone:
        raise ValueError(
            f"SelectiveUpdate: state has entries of {len(gone)} parameter(s) that are in no group, one of shape "
            f"{tuple(gone[0].shape)}, and a checkpoint has no place for them. A parameter that was replaced leaves "
            f"its state behind: delete it (del opt.state[old])"
        )
