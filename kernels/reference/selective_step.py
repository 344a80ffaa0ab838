"""The step of a list of tensors in plain torch, one tensor after the other: the definition of what is right."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..spec import Item, StepSpec, Sums, check_kinds
from .control import matched
from .decay import decaying
from .rules import advance, apply_mask, as_seen
from .selections import select
from .strengths import multipliers, parts_of, total


def _step(item: Item, spec: StepSpec) -> Sums | None:
    rule, selection, strength, draw = spec.rule, spec.selection, spec.strength, spec.draw
    moved = as_seen(rule, advance(item, rule, keep_previous=spec.keeps_previous))
    u, g, d = moved.update, moved.grad, item.param.numel()
    chosen = select(selection, item, rule, moved, draw)
    pair = multipliers(strength, parts_of(strength, chosen, item, moved, draw), item.policy_state, u.device)
    dense = selection.leaves_dense(d)  # whatever the strength
    if dense:
        chosen, pair = torch.ones_like(chosen), (torch.ones_like(pair[0]), torch.ones_like(pair[1]))
    still = u * g == 0 if strength.still and not dense else None
    if selection.control is not None and not dense:
        chosen, pair = matched(selection.control, chosen, pair, u, still, draw, item.address)
    selected, rest = pair
    mask = torch.where(chosen, selected.to(u.dtype), rest.to(u.dtype))
    if still is not None:
        mask = torch.where(still, 0.0, mask)
    sums = None
    if spec.statistics:  # before the parameter is written: a given update may lie in its storage
        masked = mask * u
        sums = Sums(d, total(chosen), selected, rest, total(u * u), total(g * g), total(u * g), total(masked * masked))
    decays = None if spec.decay is None else decaying(spec.decay, item, rule, u, mask, g)
    apply_mask(item, rule, u, mask, draw, decays)
    return sums


@torch.no_grad()
def selective_step(items: Sequence[Item], spec: StepSpec) -> list[Sums] | None:
    """Steps 5 to 7 of these tensors, in place. See `selective.kernels.selective_step`."""
    check_kinds("the reference", spec)
    sums = [_step(item, spec) for item in items]
    return [s for s in sums if s is not None] if spec.statistics else None
