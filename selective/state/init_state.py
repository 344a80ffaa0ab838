"""Making all state before the first step: `SelectiveUpdate.init_state`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.fused_rules import fused_rule
from selective.base.lent_gradients import LentGradients, gradient_dtype
from selective.base.step_base import run_step_on
from selective.parameter import initialized, is_lazy
from selective.plan.group_plan import GroupPlan
from selective.state.store import StateStore


def make_all_state(plans: Sequence[GroupPlan], store: StateStore) -> None:
    """Make the base's and the wrapper's state of all trainable parameters, as the first step would."""
    for plan in plans:
        make_base_state(store.base, plan.group, plan.params.tensors)
        for parameter in plan.params.parameters:
            if _is_trained(parameter.tensor) and store.keeps(plan, parameter):
                store.get_or_make(plan, parameter)


def make_base_state(base: Optimizer, group: dict[str, Any], params: Sequence[Tensor]) -> None:
    """Make the state of those of one group's parameters that are trained and have none."""
    known = fused_rule(base)
    missing = [p for p in params if _is_trained(p) and not base.state.get(p)]
    if known is not None and not known.supports(group):
        for p in missing:
            known.init_state(group, p, base.state[p])
    elif missing:
        _step_on_nothing(base, group, missing)


def _is_trained(p: Tensor) -> bool:
    return p.requires_grad and not is_lazy(p)


def _step_on_nothing(base: Optimizer, group: dict[str, Any], params: list[Tensor]) -> None:
    """Let the base make its state for these parameters: zero gradients, learning rate 0, parameters put back."""
    saved, lent = [(p, p.detach().clone()) for p in initialized(group["params"])], LentGradients()
    rate = group.get("lr")
    for p, _ in saved:
        lent.lend(p, None)
    for p in params:
        p.grad = torch.zeros_like(p, dtype=gradient_dtype(p))
    try:
        if rate is not None:
            group["lr"] = torch.zeros_like(rate) if isinstance(rate, Tensor) else 0.0
        run_step_on(base, [group])
    finally:
        if rate is not None:
            group["lr"] = rate
        with torch.no_grad():
            for p, value in saved:
                p.copy_(value)
        lent.give_back()
