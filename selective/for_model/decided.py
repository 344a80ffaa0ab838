"""The text that `for_model(verbose=True)` prints."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from selective.param_groups.by_kind import ParamGroups, aligned

_COLUMNS = ("group", "tensors", "elements", "lr", "weight_decay", "policy", "preconditioner")


def decided(groups: ParamGroups, members: dict[str, list[dict[str, Any]]], optimizer: Any) -> str:
    """The groups with their settings, each parameter with the reason for its group, and what the optimizer does."""
    rows: list[tuple[str, ...]] = [("optimizer", *_COLUMNS)]
    rows += [(member, *_row(group, optimizer)) for member, of_member in members.items() for group in of_member]
    if not all(members.values()):  # one optimizer for everything
        rows = [row[1:] for row in rows]
    return "\n\n".join([aligned(rows), groups.table(), optimizer.explain()])


def _row(group: dict[str, Any], optimizer: Optimizer) -> tuple[str, ...]:
    """The line of one group. A setting that the group leaves to the base is read off the base's own group."""
    first = group["params"][0][1]
    built = next(each for each in optimizer.param_groups if any(p is first for p in each["params"]))
    settings = [built.get(key, "-") for key in ("lr", "weight_decay")]
    chosen = [group.get(key) or "-" for key in ("policy", "preconditioner")]
    elements = sum(p.numel() for _, p in group["params"])
    return group["name"], str(len(group["params"])), f"{elements:,}", *map(_short, settings), *map(str, chosen)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)
