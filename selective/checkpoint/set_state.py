"""`__setstate__` with what torch's optimizers take there: loaders and reset helpers call it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from selective.checkpoint.rollback import rollback
from selective.plan.groups import Groups
from selective.state.store import StateStore, follow_changes
from selective.state.writing import OptimizerStateBackend
from selective.step_count import StepCount


def set_as_torch(
    state: Mapping[str, Any], base: Optimizer, groups: Groups, store: StateStore, count: StepCount
) -> None:
    """Take any of "state", "param_groups" and "defaults": all of it, or nothing."""
    unknown = sorted(set(state) - {"state", "param_groups", "defaults"})
    if unknown:
        raise ValueError(
            f"SelectiveUpdate: __setstate__ got {', '.join(map(repr, unknown))}, and takes 'state', 'param_groups' "
            f"and 'defaults', or what __getstate__ returns; nothing was set"
        )
    with rollback(base, groups, store, count, _not_set):
        for number, group in enumerate(state.get("param_groups", ())):
            if not all(isinstance(p, Tensor) for p in group["params"]):
                raise TypeError(
                    f"param_groups[{number}]['params'] must be a list of tensors; numbers are load_state_dict's"
                )
        if "param_groups" in state:
            base.param_groups = state["param_groups"]
        if "state" in state:
            OptimizerStateBackend(base, groups, store, count).write_states(state["state"], instead=True)
        present = {"state": base.state, "param_groups": base.param_groups}
        base.__setstate__({**present, "defaults": state.get("defaults", base.defaults)})
        follow_changes(groups, store)


def _not_set(reason: str) -> ValueError:
    return ValueError(f"SelectiveUpdate: __setstate__ failed ({reason}); nothing was set")
