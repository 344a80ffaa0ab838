"""The lines of `explain()` on a preconditioner: who is rotated, as what, and who is not and why."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from selective.explain.paragraph import Line
from selective.plan.rotation_plan import RotationPlan
from selective.policies import Dense, Policy
from selective.preconditioner import LargeSide, Shape
from selective.sharding.dtensor import shard_of

_MOST = 6  # names in one line
_SHARDED = "nothing is sent for it in a step, two all-reduces in one with a refresh; state_dict() sums up averages"


def explain_rotations(
    rotations: Sequence[RotationPlan], policy: Policy, mask_space: str, on_stacks: Sequence[str]
) -> list[Line]:
    """The lines of groups that are alike, under those that hold for the parameters that are not rotated.

    `on_stacks` are the texts that say how the rotated ones are stepped together.
    """
    first = rotations[0]
    lines = [Line("rotated", f"{_rotated(rotations)}, by {first.preconditioner!r}")]
    params = [(rotation, p) for rotation in rotations for p in rotation.shapes]
    if params:
        lines += [Line("", text) for text in (f"{first.capture.way}: {_way(first)}", *on_stacks)]
        gathered = [p for rotation, p in params if p in rotation.gathered]
        sharded = sum(shard_of(p) is not None for _, p in params) - len(gathered)
        if sharded:
            lines.append(Line("", f"{sharded:,} of them sharded: {_SHARDED}"))
        if gathered:
            lines.append(Line("", f"{len(gathered):,} of them sharded: {_gathering(first, gathered)}"))
    lines += [Line("left out", text) for text in _left_out(rotations)]
    by_reason: dict[str, list[str]] = {}
    for rotation in rotations:
        for name, why in rotation.reasons_not_rotated.items():
            by_reason.setdefault(why, []).append(name)
    lines += [Line("not", f"{_listed(names)}: {why}") for why, names in by_reason.items()]
    if not isinstance(policy, Dense) and params:
        lines.append(Line("mask", f"made in the {mask_space} space of rotated parameters"))
    return lines


def _gathering(rotation: RotationPlan, gathered: list[Tensor]) -> str:
    numbers, observes = sum(p.numel() for p in gathered), rotation.preconditioner.observes()
    return (
        f"gathered in every step, {numbers:,} float32 numbers {'three times' if observes else 'twice'} (and what a "
        "policy reads, where it does in the original space), and each rank makes the whole product; sides='unsharded' "
        "sends nothing"
    )


def _rotated(rotations: Sequence[RotationPlan]) -> str:
    by_shape: dict[Shape, list[str]] = {}
    for rotation in rotations:
        for parameter in rotation.members:
            if parameter.tensor in rotation.shapes:
                by_shape.setdefault(rotation.shapes[parameter.tensor], []).append(parameter.name)
    return "; ".join(f"{_listed(names)} as {_shape(shape)}" for shape, names in by_shape.items()) or "none of them"


def _left_out(rotations: Sequence[RotationPlan]) -> list[str]:
    """Texts on the sides of rotated parameters that are not rotated because their bases would be too large."""
    sides: dict[tuple[str, int, str], list[tuple[str, LargeSide]]] = {}
    for rotation in rotations:
        for parameter in rotation.members:
            shape = rotation.shapes.get(parameter.tensor)
            large = [] if shape is None else rotation.preconditioner_for(parameter.tensor).left_out(shape)
            for side in large:
                sides.setdefault((side.side, side.length, side.why), []).append((parameter.name, side))
    return [
        f"the {side} of {_listed([name for name, _ in members])} ({length:,}), by {why}: saves "
        f"{sum(large.bytes for _, large in members):,} bytes that would last"
        for (side, length, why), members in sides.items()
    ]


def _shape(shape: Shape) -> str:
    batch, rows, columns = shape
    return f"{rows} x {columns}" if batch == 1 else f"{batch} of {rows} x {columns}"


def _listed(names: list[str]) -> str:
    more = len(names) - _MOST
    return ", ".join(names) if more <= 0 else f"{', '.join(names[:_MOST])} and {more} more"


def _way(rotation: RotationPlan) -> str:
    return {
        "fused": "the known rule runs on rotated gradients",
        "scratch": "the base steps zeros in place of the parameter, on a rotated gradient",
        "delta": "the base steps the rotated value of the parameter in float32, on a rotated gradient",
    }[rotation.capture.way]
