"""The parts of an optimizer, each built without the whole."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from state_cases import base_of, numbers
from torch.optim import Optimizer

from selective import MGUP, Preconditioner
from selective.plan.groups import Groups
from selective.plan.options import Options
from selective.plan.policy_groups import PolicyGroup, PreconditionerGroup
from selective.state.store import StateStore
from selective.step_count import StepCount


class Parts(NamedTuple):
    base: Optimizer
    groups: Groups
    store: StateStore
    count: StepCount


def groups_of(base: Optimizer, preconditioner: Preconditioner | None = None, **options: Any) -> Groups:
    return Groups(base, Options(**options), PolicyGroup(MGUP(), PreconditionerGroup(preconditioner)))


def parts_of(base: Optimizer, preconditioner: Preconditioner | None = None, **options: Any) -> Parts:
    groups, count = groups_of(base, preconditioner, **options), StepCount(seed=3)
    return Parts(base, groups, StateStore(base, groups.options, count), count)


def two_groups() -> Optimizer:
    """AdamW over a matrix with a policy of its own group, and a vector."""
    matrix, vector = (torch.nn.Parameter(numbers(shape, seed)) for seed, shape in enumerate([(6, 4), (6,)]))
    return base_of([{"params": [matrix]}, {"params": [vector]}])


def give_gradients(base: Optimizer, seed: int = 0) -> None:
    for group in base.param_groups:
        for p in group["params"]:
            p.grad = numbers(p.shape, 10 + seed)
