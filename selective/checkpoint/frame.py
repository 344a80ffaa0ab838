"""Checks of a checkpoint's structure: dictionaries, groups, entry names, counters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from selective.base.mismatch import CheckpointMismatch
from selective.plan.policy_groups import KEYS
from selective.state.entries import BASIS, BASIS_SHAPE, BASIS_SKIPPED, BASIS_STEPS, POLICY, SEED, STEP
from selective.state.one_entry import MOST_STEPS, OF_A_BASIS, check_known, check_plain, number_below, number_of

_LAYOUT = {BASIS_STEPS: (torch.int64, ()), BASIS_SHAPE: (torch.int64, (3,)), BASIS_SKIPPED: (torch.int64, ())}


def checked_frame(state_dict: Any) -> dict[str, Any]:
    """Return the checkpoint as a dictionary; raise if its structure is not that of torch's state dictionaries."""
    if not isinstance(state_dict, Mapping):
        raise CheckpointMismatch(f"the checkpoint is a {type(state_dict).__name__}, must be a dictionary")
    for key, kind, name in (("state", Mapping, "a dictionary"), ("param_groups", (list, tuple), "a list")):
        if key not in state_dict:
            found = sorted(map(str, state_dict))
            raise CheckpointMismatch(f"the checkpoint has no {key!r}; found {found}")
        _must_be(state_dict[key], kind, name, repr(key))
    for index, entries in state_dict["state"].items():
        _must_be(entries, Mapping, "a dictionary", f"state of parameter {index!r}")
    for number, group in enumerate(state_dict["param_groups"]):
        _must_be(group, Mapping, "a dictionary", f"param_groups[{number}]")
        _must_be(group.get("params"), (list, tuple), "a list", f"param_groups[{number}]['params']")
        for index in group["params"]:
            _must_be(index, (int, str), "a number or a name", f"param_groups[{number}]['params'] has what")
    return dict(state_dict)


def _must_be(value: Any, kind: Any, name: str, what: str) -> None:
    if not isinstance(value, kind):
        raise CheckpointMismatch(f"the checkpoint's {what} is a {type(value).__name__}, must be {name}")


def check_group_sizes(state_dict: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
    """Refuse a checkpoint whose groups are not of the same sizes as these, or that names a parameter twice."""
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(groups):
        raise CheckpointMismatch(
            f"the checkpoint has {len(saved_groups)} parameter groups, the optimizer {len(groups)}"
        )
    for number, (saved, live) in enumerate(zip(saved_groups, groups, strict=True)):
        if len(saved["params"]) != len(live["params"]):
            raise CheckpointMismatch(
                f"parameter group {number} has {len(saved['params'])} parameters in the checkpoint, "
                f"{len(live['params'])} in the optimizer"
            )
        stray = next((key for key in KEYS if key in saved and key not in live), None)
        if stray is not None:
            raise CheckpointMismatch(
                f"the checkpoint's param_groups[{number}] has a {stray!r}, which a checkpoint of ours keeps elsewhere"
            )
    saved_indices = [index for group in saved_groups for index in group["params"]]
    named: dict[Any, Any] = {}
    for index, p in zip(saved_indices, (p for group in groups for p in group["params"]), strict=True):
        if named.setdefault(index, p) is not p:  # one that is named twice here, too, is stepped twice by the base
            raise CheckpointMismatch(f"the checkpoint's param_groups name parameter {index!r} twice")


def step_and_seed_of(wrapper_entries: Mapping[Any, Mapping[str, Any]], saved_indices: Sequence[Any]) -> dict[str, int]:
    """Return the step count and the seed by entry name; refuse entries that the wrapper would not have made.

    What depends on policies, preconditioners and shapes is checked later. The numbers in a tensor of the right shape
    can't be checked.
    """
    numbers: dict[str, int] = {}
    known = set(saved_indices)
    for index, entries in wrapper_entries.items():
        if index not in known:
            raise CheckpointMismatch(f"the checkpoint's state has a parameter {index!r}, its groups don't")
        _check_names(entries, index)
        for key, value in entries.items():
            where = f"the checkpoint's {key!r} of parameter {index!r}"
            if key in (STEP, SEED):
                number = number_of(key, value, where)
                if numbers.setdefault(key, number) != number:
                    raise CheckpointMismatch(f"{where} is {number}, of another parameter {numbers[key]}")
                continue
            check_plain(value, where)
            if key in _LAYOUT and (value.dtype, tuple(value.shape)) != _LAYOUT[key]:
                dtype, shape = _LAYOUT[key]
                raise CheckpointMismatch(
                    f"{where} is {value.dtype} of shape {tuple(value.shape)}, must be {dtype} of {shape}"
                )
            if key in (BASIS_STEPS, BASIS_SKIPPED):
                number_below(MOST_STEPS, value, where)
    return numbers


def _check_names(entries: Mapping[str, Any], index: Any) -> None:
    """Refuse a parameter of which an entry is missing, or has an unknown name."""
    for key in entries:
        check_known(key, f"the checkpoint's parameter {index!r}")
    rotated = any(key in OF_A_BASIS or key.startswith(BASIS) for key in entries)
    for key in (STEP, SEED, POLICY, *(OF_A_BASIS if rotated else ())):
        if key not in entries:
            raise CheckpointMismatch(f"the checkpoint's parameter {index!r} has no {key!r}")
