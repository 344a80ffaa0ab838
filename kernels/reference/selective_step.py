"""The step of a list of tensors in plain torch, one tensor after the other: the definition of what is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..spec import Item, StepSpec, Sums, check_kinds
from .control import matched
from .decay import decaying
from .rules import Advanced, advance, apply_mask, as_seen
from .selections import select
from .strengths import Pair, multipliers, parts_of, total


@dataclass
class Mask:
    """The mask of one tensor: the multiplier of each coordinate, who is selected, and the two multipliers."""

    values: Tensor  # shaped like the parameter, in the dtype of the update
    chosen: Tensor  # bool
    pair: Pair


def mask_of(item: Item, spec: StepSpec, moved: Advanced, chosen: Tensor, policy_state: dict[str, Tensor]) -> Mask:
    """The mask that strength and control make of a selection. Alignment moves its average in `policy_state`."""
    selection, strength, draw = spec.selection, spec.strength, spec.draw
    u, g = moved.update, moved.grad
    pair = multipliers(strength, parts_of(strength, chosen, item, moved, draw), policy_state, u.device)
    dense = selection.leaves_dense(item.param.numel())  # whatever the strength
    if dense:
        chosen, pair = torch.ones_like(chosen), (torch.ones_like(pair[0]), torch.ones_like(pair[1]))
    still = u * g == 0 if strength.still and not dense else None
    if selection.control is not None and not dense:
        chosen, pair = matched(selection.control, chosen, pair, u, still, draw, item.address)
    selected, rest = pair
    mask = torch.where(chosen, selected.to(u.dtype), rest.to(u.dtype))
    if still is not None:
        mask = torch.where(still, 0.0, mask)
    return Mask(mask, chosen, pair)


def sums_of(mask: Mask, moved: Advanced) -> Sums:
    """The report of a tensor's step. Call it before the parameter is written: a given update may lie in its memory."""
    u, g, masked = moved.update, moved.grad, mask.values * moved.update
    squares = total(u * u), total(g * g), total(u * g), total(masked * masked)
    return Sums(u.numel(), total(mask.chosen), *mask.pair, *squares)


def _step(item: Item, spec: StepSpec) -> Sums | None:
    rule, draw = spec.rule, spec.draw
    moved = as_seen(rule, advance(item, rule, keep_previous=spec.keeps_previous))
    chosen = select(spec.selection, item, rule, moved, draw)
    mask = mask_of(item, spec, moved, chosen, item.policy_state)
    u = moved.update
    sums = sums_of(mask, moved) if spec.statistics else None
    decays = None if spec.decay is None else decaying(spec.decay, item, rule, u, mask.values, moved.grad)
    apply_mask(item, rule, u, mask.values, draw, decays)
    return sums


@torch.no_grad()
def selective_step(items: Sequence[Item], spec: StepSpec) -> list[Sums] | None:
    """Steps 5 to 7 of these tensors, in place. See `selective.kernels.selective_step`."""
    check_kinds("the reference", spec)
    sums = [_step(item, spec) for item in items]
    return [s for s in sums if s is not None] if spec.statistics else None
