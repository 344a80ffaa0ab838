"""The division of groups between two bases: one takes matrices with two dimensions, the other takes everything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from selective.param_groups.settings import MATRICES

Group = dict[str, Any]


def taken_by_matrices(groups: list[Group]) -> tuple[list[Group], list[Group]]:
    """The groups of matrices with two dimensions, and the groups of everything else. One with both is split."""
    matrices: list[Group] = []
    others: list[Group] = []
    for group in groups:
        flat = [(name, p) for name, p in group["params"] if is_matrix_kind(group) and p.dim() == 2]
        deep = [(name, p) for name, p in group["params"] if not is_matrix_kind(group) or p.dim() != 2]
        matrices += [{**group, "params": flat}] if flat else []
        others += [{**group, "params": deep}] if deep else []
    return matrices, others


def kind_of(group: Group) -> str:
    """The kind of a group's parameters, which its name begins with."""
    return group["name"].partition(",")[0]


def is_matrix_kind(group: Group) -> bool:
    """True if the group's kind is one of those that a preconditioner rotates."""
    return kind_of(group) in MATRICES


def with_rates_of_rest(groups: list[Group], lr: float | Mapping[str, float] | None) -> None:
    """Give convolutions and stacks of experts the learning rate of the base that steps them, which is the rest's.

    In `lr`, "matrices" is then a rate for the other base. A kind that `lr` names has the rate that stands there.
    """
    if not isinstance(lr, Mapping):
        return
    for group in groups:
        if is_matrix_kind(group) and kind_of(group) not in [kind for kind in lr if kind != "matrices"]:
            if "rest" not in lr:
                raise ValueError(
                    f"for_model: {group['name']!r} ({group['params'][0][0]}) goes to the rest's optimizer, and lr has "
                    f"no value for it; add {kind_of(group)!r}, or 'rest'"
                )
            group["lr"] = lr["rest"]
