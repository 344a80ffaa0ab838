"""Checkpoints of a chain: torch's flat form over all members, which is loaded into all of them or into none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer

from selective.base.mismatch import CheckpointMismatch
from selective.chained.matches_bare import check_bare
from selective.chained.members import Members
from selective.checkpoint.frame import check_group_sizes
from selective.checkpoint.rollback import base_snapshot, snapshot
from selective.messages.said_by import member, said_by
from selective.optimizer import SelectiveUpdate
from selective.state.entries import own_part, restore_dtypes

EXTRAS = "members"
"""The key under which a checkpoint has what torch's form has no place for, by member. It is there only if need be."""


def save(members: Members) -> dict[str, Any]:
    """Return `{"state", "param_groups"}`, with the parameters counted on over all members."""
    state: dict[Any, Any] = {}
    groups: list[dict[str, Any]] = []
    extras: dict[str, Any] = {}
    for name, optimizer in members:
        with said_by(member(name)):
            saved = optimizer.state_dict()
        start, numbers = sum(len(group["params"]) for group in groups), dict[Any, int]()
        for group in saved["param_groups"]:
            for index in group["params"]:
                numbers.setdefault(index, start + len(numbers))
            groups.append({**group, "params": [numbers[index] for index in group["params"]]})
        state.update({numbers[index]: entries for index, entries in saved["state"].items() if index in numbers})
        more = {key: value for key, value in saved.items() if key not in ("state", "param_groups")}
        unnumbered = {index: entries for index, entries in saved["state"].items() if index not in numbers}
        if more or unnumbered:
            extras[name] = {**more, **({"state": unnumbered} if unnumbered else {})}
    return {"state": state, "param_groups": groups, **({EXTRAS: extras} if extras else {})}


def load(members: Members, checkpoint: dict[str, Any]) -> None:
    """Load a checkpoint whose structure `checked_frame` accepted into all members, or into none.

    Raises:
        CheckpointMismatch: a member can't take its part. The message has the member's name and its reason.
    """
    check_group_sizes(checkpoint, members.groups())
    parts = _split(members, checkpoint)
    undo_all = [member_snapshot(optimizer) for optimizer in members.optimizers]
    try:
        for (name, optimizer), part in zip(members, parts, strict=True):
            _load_member(name, optimizer, part)
    except BaseException:
        for undo in undo_all:
            undo()
        raise


def _load_member(name: str, optimizer: Optimizer, part: dict[str, Any]) -> None:
    """Load a member's part. A failure is a CheckpointMismatch that has the member's name."""
    try:
        if isinstance(optimizer, SelectiveUpdate):
            optimizer.load_state_dict(part)
        else:
            _load_bare(optimizer, part)
    except CheckpointMismatch as error:
        found, advice, long = error.said
        raise CheckpointMismatch(f"member {name!r}: {found}", advice, long) from error
    except Exception as error:  # a member of another package may raise anything
        raise CheckpointMismatch(
            f"the checkpoint can't be loaded into member {name!r} ({type(error).__name__}: {error})"
        ) from error


def _split(members: Members, checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each member's part of the checkpoint."""
    extras, state = checkpoint.get(EXTRAS, {}), dict(checkpoint["state"])
    parts = []
    for (name, _), groups in zip(members, members.parts(checkpoint["param_groups"]), strict=True):
        own = {index: state.pop(index) for group in groups for index in group["params"] if index in state}
        more = dict(extras.get(name, {}))
        unnumbered = more.pop("state", {})
        parts.append({**more, "state": {**own, **unnumbered}, "param_groups": groups})
    if state:
        raise CheckpointMismatch(f"the checkpoint's state has a parameter {next(iter(state))!r}, its groups don't")
    return parts


def _load_bare(optimizer: Optimizer, part: dict[str, Any]) -> None:
    """Load a part into a member that is not wrapped. dtypes are kept exactly, as wrapped members keep them."""
    name = type(optimizer).__name__
    if own_part({"state": {k: v for k, v in part["state"].items() if isinstance(v, Mapping)}}):
        raise CheckpointMismatch(f"the checkpoint has this member wrapped, and here it is a bare {name}")
    live = [dict(group) for group in optimizer.param_groups]
    check_bare(optimizer, part)
    optimizer.load_state_dict(part)
    for number, (old, new) in enumerate(zip(live, optimizer.param_groups, strict=True)):
        missing = [key for key in old if key in optimizer.defaults and key not in new]
        if missing:
            raise CheckpointMismatch(
                f"the checkpoint is not of {name}: its param_groups[{number}] has no {', '.join(map(repr, missing))}"
            )
    saved = [index for group in part["param_groups"] for index in group["params"]]
    for index, p in zip(saved, (p for group in optimizer.param_groups for p in group["params"]), strict=True):
        if index in part["state"]:
            restore_dtypes(optimizer.state[p], part["state"][index])


def member_snapshot(optimizer: Optimizer) -> Callable[[], None]:
    """Return a function that puts a member back as it is now."""
    if isinstance(optimizer, SelectiveUpdate):
        return snapshot(optimizer.base, optimizer.groups, optimizer.store, optimizer.count)
    inner = [value for value in vars(optimizer).values() if isinstance(value, Optimizer)]
    undo_all = [*(member_snapshot(optimizer) for optimizer in inner), base_snapshot(optimizer)]

    def undo() -> None:
        for undo_part in undo_all:
            undo_part()

    return undo
