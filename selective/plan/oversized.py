"""The warning for rotated sides whose bases are out of proportion to their matrices."""

from __future__ import annotations

from collections.abc import Sequence

from selective.messages.user_line import warn
from selective.plan.group_plan import GroupPlan
from selective.preconditioner import LargeSide

_MOST = 3  # sides that are named


def oversized(plans: Sequence[GroupPlan]) -> str | None:
    """Return the sides that are rotated beyond the default limits, with their bytes; None if there are none."""
    sides: list[tuple[str, LargeSide]] = []
    kinds: dict[str, None] = {}
    for rotation in (plan.rotation for plan in plans if plan.rotation is not None):
        for member in rotation.members:
            shape = rotation.shapes.get(member.tensor)
            large = [] if shape is None else rotation.preconditioner_for(member.tensor).oversized(shape)
            sides += [(f"the {side.side} of {member.name!r}", side) for side in large]
            kinds |= dict.fromkeys([repr(rotation.preconditioner)] if large else [])
    if not sides:
        return None
    named = [f"{name} ({side.length:,}) keep {side.bytes:,} bytes, {side.why}" for name, side in sides[:_MOST]]
    more = f"; and {len(sides) - _MOST:,} more" if len(sides) > _MOST else ""
    total = sum(side.bytes for _, side in sides)
    who = " and ".join(kinds) + (" rotate" if len(kinds) > 1 else " rotates")
    return (
        f"{who} sides that are out of proportion to their matrices, which keeps {total:,} bytes: "
        f"{'; '.join(named)}{more}"
    )


def warn_of_oversized(plans: Sequence[GroupPlan]) -> None:
    """Warn if the limit that the user has chosen lets such sides be rotated."""
    sides = oversized(plans)
    if sides is not None:
        warn(f"SelectiveUpdate: {sides}. The default of max_state_ratio leaves them out")


def oversized_as_saved(plans: Sequence[GroupPlan]) -> str | None:
    """Return the warning for sides that are rotated because a checkpoint's run did so; None if there are none."""
    sides = oversized(plans)
    if sides is None:
        return None
    return (
        f"SelectiveUpdate: the run of this checkpoint goes on as it was: {sides}. A run that begins anew leaves them "
        f"out, unless max_state_ratio says otherwise. A run can't drop a basis half-way"
    )
