"""The lines of `explain()` on a preconditioner: who is rotated, as what, who is not and why, and the memory."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from selective.plan.rotation_plan import RotationPlan
from selective.policies import Dense, Policy
from selective.rotation.contract import is_foreign
from selective.sharding.dtensor import shard_of

_MOST = 6  # names in one line
_SHARDED = "nothing is sent for it in a step, two all-reduces in one with a refresh; state_dict() sums up averages"


def explain_rotation(rotation: RotationPlan, policy: Policy, mask_space: str) -> list[str]:
    """The lines of one group, under those that hold for the parameters that are not rotated."""
    lines = [f"  rotated   {_rotated(rotation)}, by {rotation.preconditioner!r}"]
    if rotation.shapes:
        lines.append(f"            {rotation.capture.way}: {_way(rotation)}")
        gathered = [p for p in rotation.shapes if p in rotation.gathered]
        sharded = sum(shard_of(p) is not None for p in rotation.shapes) - len(gathered)
        if sharded:
            lines.append(f"            {sharded:,} of them sharded: {_SHARDED}")
        if gathered:
            lines.append(f"            {len(gathered):,} of them sharded: {_gathering(rotation, gathered)}")
    by_reason: dict[str, list[str]] = {}
    for name, why in rotation.reasons_not_rotated.items():
        by_reason.setdefault(why, []).append(name)
    lines += [f"  not       {_listed(names)}: {why}" for why, names in by_reason.items()]
    if not isinstance(policy, Dense) and rotation.shapes:
        lines.append(f"  mask      made in the {mask_space} space of rotated parameters")
    if rotation.shapes:
        lines.append(f"  memory    of rotated ones: {_memory(rotation, policy)}")
    return lines


def _gathering(rotation: RotationPlan, gathered: list[Tensor]) -> str:
    numbers, observes = sum(p.numel() for p in gathered), rotation.preconditioner.observes()
    return (
        f"gathered in every step, {numbers:,} float32 numbers {'three times' if observes else 'twice'} (and what a "
        "policy reads, where it does in the original space), and each rank makes the whole product; sides='unsharded' "
        "sends nothing"
    )


def _rotated(rotation: RotationPlan) -> str:
    if not rotation.shapes:
        return "none of them"
    found: dict[tuple[int, int, int], list[str]] = {}
    for parameter in rotation.members:
        if parameter.tensor in rotation.shapes:
            found.setdefault(rotation.shapes[parameter.tensor], []).append(parameter.name)
    return "; ".join(f"{_listed(names)} as {_shape(shape)}" for shape, names in found.items())


def _shape(shape: tuple[int, int, int]) -> str:
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


def _memory(rotation: RotationPlan, policy: Policy) -> str:
    examples = {shape: p for p, shape in rotation.shapes.items()}
    of_shape = {shape: _bytes(_state(rotation, p)) for shape, p in examples.items()}
    kept = sum(of_shape[shape] for shape in rotation.shapes.values())
    elements = sum(p.numel() for p in rotation.shapes)
    text = f"{kept:,} bytes that last, {kept / max(elements, 1):.2f} a parameter; during the step "
    if rotation.capture.way == "fused":
        text += "their float32 gradients and updates, of 512 MiB of them at a time"
    else:
        text += (
            f"float32 copies of their gradients and {'two of' if rotation.capture.way == 'delta' else 'one of'} them"
        )
    if is_foreign(rotation.preconditioner):
        return f"{text}, and one copy of them, because the preconditioner is your own code"
    return text


def _state(rotation: RotationPlan, param: Tensor) -> Iterable[Tensor]:
    return rotation.fresh(param).values()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
