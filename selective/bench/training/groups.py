"""The parameter groups that a user's model has, of a benchmark's parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch.nn import Parameter

from selective.bench.contenders import ADAMW
from selective.param_groups.settings import KINDS, MATRICES, VIEWS
from selective.plan.policy_groups import KEYS

Group = dict[str, Any]
PolicyOn = Literal["all", "matrices"]  # the groups that have the policy


def groups_of(params: Sequence[Parameter], kinds: Sequence[str], policy_on: PolicyOn = "all") -> list[Group]:
    """Sort parameters into groups by their kinds, as `param_groups_for(model, weight_decay=...)` does with a model's.

    With `policy_on="matrices"` the groups of embeddings, head and vectors have the policy None, and are dense.
    """
    groups: list[Group] = []
    for kind in KINDS:
        members = [p for p, of_kind in zip(params, kinds, strict=True) if of_kind == kind]
        if not members:
            continue
        group: Group = {"params": members, "weight_decay": 0.0 if kind == "vectors" else ADAMW["weight_decay"]}
        if kind in VIEWS:
            group["matrix_view"] = kind
        if kind not in MATRICES:
            group["preconditioner"] = None
            if policy_on == "matrices":
                group["policy"] = None
        groups.append(group)
    return groups


def plain(groups: Sequence[Group]) -> list[Group]:
    """The same groups without the wrapper's own keys, for an optimizer that is not wrapped."""
    return [{key: value for key, value in group.items() if key not in KEYS} for group in groups]


def divided(groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """The groups whose parameters are matrices with two dimensions, which Muon takes, and all others."""
    flat = [g for g in groups if "preconditioner" not in g and all(p.dim() == 2 for p in g["params"])]
    return flat, [g for g in groups if not any(g is other for other in flat)]
