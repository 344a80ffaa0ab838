"""Checks that a part of a checkpoint fits a member that is not wrapped, which torch itself would take unseen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from selective.base.fused_rules import fused_rule
from selective.base.mismatch import CheckpointMismatch
from selective.base.same_class import check_first_state
from selective.parameter import is_lazy


def check_bare(optimizer: Optimizer, part: Mapping[str, Any]) -> None:
    """Refuse state that lacks an entry, or that has one of another shape. Call it before `part` is loaded.

    An entry has to be shaped as the live one of the same name. Where there is no live one, moments of a class that the
    kernels know have to be shaped as their parameter.

    Raises:
        CheckpointMismatch: an entry is missing or has another shape. Nothing has moved.
    """
    name, rule = type(optimizer).__name__, fused_rule(optimizer)
    for saved, group in zip(part["param_groups"], optimizer.param_groups, strict=True):
        members = [(i, p) for i, p in zip(saved["params"], group["params"], strict=True) if not is_lazy(p)]
        stepped = {p: part["state"][i] for i, p in members if part["state"].get(i)}
        for p, entries in stepped.items():
            moments = [] if rule is None else rule.checked_moment_names(saved, entries, name)
            _check_shapes(name, p, entries, optimizer.state.get(p, {}), moments)
        if stepped and rule is None:
            check_first_state(optimizer, saved, group, stepped, ())


def _check_shapes(
    name: str, p: Tensor, entries: Mapping[str, Any], live: Mapping[str, Any], moments: list[str]
) -> None:
    for key, value in entries.items():
        expected = live[key] if isinstance(live.get(key), Tensor) else p if key in moments else None
        if expected is not None and getattr(value, "shape", expected.shape) != expected.shape:
            raise CheckpointMismatch(
                f"the checkpoint's {key!r} of a parameter of {name} has shape {tuple(value.shape)}, and "
                f"{tuple(expected.shape)} is needed for a parameter of shape {tuple(p.shape)}"
            )
