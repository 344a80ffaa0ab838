"""The setups: a base optimizer, with a policy and a preconditioner or without. All are made by the public interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from evidence.runs import Run
from selective import (
    MGUP,
    AlphaConsistency,
    Cautious,
    Policy,
    Preconditioner,
    RandomMask,
    SelectiveUpdate,
    param_groups_for,
)

DECAY = 0.1
CONTROL = "random like "
Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Setup:
    """A base by its name in `BASES`. Policy and preconditioner are for the model's inner matrices alone."""

    base: str
    policy: Policy | None = None
    space: Preconditioner | None = None


def _adamw(groups: Groups) -> Optimizer:
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=groups[0]["params"][0].is_cuda)


def _lion(groups: Groups) -> Optimizer:
    from pytorch_optimizer import Lion

    return Lion(groups, betas=(0.95, 0.98))


BASES: dict[str, Callable[[Groups], Optimizer]] = {"AdamW": _adamw, "Lion": _lion}
POLICIES: dict[str, Policy] = {
    "Cautious": Cautious(),
    "MGUP mild": MGUP(alpha=1.5, gamma=0.5),  # the paper's advice for bases whose learning rate is tuned
    "MGUP official": MGUP(alpha=2, gamma=0.1),  # of the authors' code, for AdamW and Lion
    "AlphaConsistency": AlphaConsistency(),
}
SETUPS: dict[str, Setup] = {
    **{base: Setup(base) for base in BASES},
    **{f"{name} on {base}": Setup(base, policy) for base in BASES for name, policy in POLICIES.items()},
}


def control_of(setup: str) -> str:
    """The name of the matched random control of a setup with a policy."""
    return CONTROL + setup


def setup_of(name: str) -> Setup:
    """The setup with this name, or the control of one. Raises KeyError if there is none."""
    if not name.startswith(CONTROL):
        return SETUPS[name]
    setup = SETUPS[name.removeprefix(CONTROL)]
    if setup.policy is None:
        raise KeyError(f"{name}: a control matches a policy, and {name.removeprefix(CONTROL)!r} has none")
    return replace(setup, policy=RandomMask.matching(setup.policy))


def optimizer_of(run: Run, model: nn.Module) -> Optimizer:
    """The optimizer of a run. Vectors do not decay, everything else does."""
    setup = setup_of(run.setup)
    rates = run.lr if run.rest_lr is None else {"matrices": run.lr, "rest": run.rest_lr}
    if setup.policy is None and setup.space is None:
        groups = param_groups_for(model, lr=rates, weight_decay=DECAY, ask=True)
        return BASES[setup.base]([{**group, "params": [p for _, p in group["params"]]} for group in map(_bare, groups)])
    return SelectiveUpdate.for_model(
        model, BASES[setup.base], lr=rates, weight_decay=DECAY, no_decay=("vectors",), policy=setup.policy,
        preconditioner=setup.space, parts=None, seed=run.seed, statistics=False,
    )  # fmt: skip


def _bare(group: dict[str, Any]) -> dict[str, Any]:
    return {key: group[key] for key in ("params", "lr", "weight_decay")}
