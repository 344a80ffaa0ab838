"""The whole step of a list of tensors, one tensor after the other, in plain torch: the definition."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..spec import Draw, Item, Rule, Selection, Strength, Sums, check_kinds, refuse_kind
from .control import matched
from .random import sample_positions, uniform_bits
from .rules import Advanced, advance, apply_mask, as_seen, nesterov
from .strengths import Parts, multipliers, total
from .top_k import top_k


def score_of(selection: Selection, rule: Rule, moved: Advanced) -> Tensor:
    """The signed score that top-K ranks."""
    if selection.score == "update":
        return moved.update * moved.grad
    assert moved.momentum is not None  # checked before anything moved
    x = moved.momentum if selection.score == "momentum" else nesterov(rule, moved.momentum, moved.grad)
    return x * moved.grad


def _agreement(selection: Selection, moved: Advanced) -> Tensor:
    if selection.product == "previous_momentum":
        previous = moved.previous_momentum
        assert previous is not None
        product = previous * moved.grad
    else:
        x = moved.update if selection.product == "update" else moved.momentum
        assert x is not None
        product = x * moved.grad
    agree = product > 0 if selection.strict else product >= 0
    if selection.product == "previous_momentum":
        agree = agree | ~(moved.previous_momentum != 0).any()
    return agree


def _top_k(selection: Selection, item: Item, rule: Rule, moved: Advanced, draw: Draw) -> Tensor:
    score, d = score_of(selection, rule, moved), item.param.numel()
    positions = sample_positions(draw, item.address, d, score.device) if selection.quantile == "sampled" else None
    if positions is None:
        return top_k(score, int(selection.fraction * d))
    sample = score.reshape(-1)[positions]
    sample = torch.where(torch.isnan(sample), -torch.inf, sample)
    rank = max(int(selection.fraction * sample.numel()), 1)
    return score >= sample.sort(descending=True).values[rank - 1]  # NaN >= x is false


def _bernoulli(selection: Selection, item: Item, draw: Draw) -> Tensor:
    param, limit = item.param, round(selection.probability * 2**24)
    shape = list(param.shape) if selection.unit == "element" else [1] * param.dim()
    if selection.unit == "row" and param.dim():
        shape[0] = param.shape[0]
    first = 0 if item.shard is None else item.shard.first(selection.unit)
    assert first is not None, "a shard whose random numbers do not follow each other is stepped by kernels/sharded"
    kept = uniform_bits(draw, item.address, math.prod(shape), offset=first, device=param.device) < limit
    return kept.reshape(shape).expand(param.shape)


def select(selection: Selection, item: Item, rule: Rule, moved: Advanced, draw: Draw) -> Tensor:
    if selection.kind == "everything":
        return torch.ones_like(item.param, dtype=torch.bool)
    if selection.kind == "agreement":
        return _agreement(selection, moved)
    if selection.kind == "top_k":
        return _top_k(selection, item, rule, moved, draw)
    if selection.kind == "bernoulli":
        return _bernoulli(selection, item, draw)
    refuse_kind("the reference", "selection", selection.kind)


def parts_of(strength: Strength, selected: Tensor, item: Item, moved: Advanced, draw: Draw) -> Parts:
    """The sums that this strength needs; over the sample where it says so."""
    if strength.kind == "fixed":
        return Parts(selected.numel())
    if strength.kind == "alignment":
        m, g = moved.momentum, moved.grad
        assert m is not None
        return Parts(m.numel(), dot=total(m * g), momentum_sq=total(m * m), grad_sq=total(g * g))
    if strength.kind not in ("mean_preserving", "norm_preserving"):
        refuse_kind("the reference", "strength", strength.kind)
    x = {"update": moved.update, "momentum": moved.momentum, "gradient": moved.grad}[strength.of]
    assert x is not None or strength.kind == "mean_preserving"
    if strength.estimate == "sampled":
        positions = sample_positions(draw, item.address, selected.numel(), selected.device)
        if positions is not None:
            selected = selected.reshape(-1)[positions]
            x = None if x is None else x.reshape(-1)[positions]
    if strength.kind == "mean_preserving":
        return Parts(selected.numel(), selected=total(selected))
    assert x is not None
    squares = x * x
    return Parts(
        selected.numel(),
        selected_sq=total(torch.where(selected, squares, 0.0)),
        rest_sq=total(torch.where(selected, 0.0, squares)),
    )


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
