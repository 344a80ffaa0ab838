"""The whole step of a list of tensors, one tensor after the other, in plain torch: the definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..spec import Draw, Item, Rule, Selection, Strength, Sums, check_kinds
from .control import matched
from .rules import advance, apply_mask, as_seen
from .selections import select
from .strengths import multipliers, parts_of, total


def _step(
    item: Item, rule: Rule, selection: Selection, strength: Strength, draw: Draw, statistics: bool
) -> Sums | None:
    keep = selection.kind == "agreement" and selection.product == "previous_momentum"
    moved = as_seen(rule, advance(item, rule, keep_previous=keep))
    u, g, d = moved.update, moved.grad, item.param.numel()
    selected = select(selection, item, rule, moved, draw)
    above, below = multipliers(strength, parts_of(strength, selected, item, moved, draw), item.policy_state, u.device)
    dense = selection.kind == "top_k" and int(selection.fraction * d) == 0  # whatever the strength
    if dense:
        selected, above, below = torch.ones_like(selected), torch.ones_like(above), torch.ones_like(below)
    still = u * g == 0 if strength.still and not dense else None
    if selection.control is not None and not dense:
        pair = above, below
        selected, (above, below) = matched(selection.control, selected, pair, u, still, draw, item.address)
    mask = torch.where(selected, above.to(u.dtype), below.to(u.dtype))
    if still is not None:
        mask = torch.where(still, 0.0, mask)
    sums = None
    if statistics:  # before the parameter is written: a given update may lie in its storage
        masked = mask * u
        sums = Sums(d, total(selected), above, below, total(u * u), total(g * g), total(u * g), total(masked * masked))
    apply_mask(item, rule, u, mask, draw)
    return sums


@torch.no_grad()
def selective_step(
    items: Sequence[Item],
    *,
    rule: Rule,
    selection: Selection,
    strength: Strength,
    draw: Draw,
    statistics: bool = False,
) -> list[Sums] | None:
    """Steps 5 to 7 of these tensors, in place. See `selective.kernels.selective_step`."""
    check_kinds("the reference", rule, selection, strength)
    sums = [_step(item, rule, selection, strength, draw, statistics) for item in items]
    return [s for s in sums if s is not None] if statistics else None
