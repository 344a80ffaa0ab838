"""Selections of one whole tensor: from its gradient, update and momentum to a bool tensor shaped like it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..spec import Draw, Item, Rule, Selection, refuse_kind, refuse_score
from .random import sample_positions, uniform_bits
from .rules import Advanced, nesterov
from .top_k import top_k


def score_of(selection: Selection, rule: Rule, moved: Advanced) -> Tensor:
    """The signed score that top-K ranks. Raises a ValueError for a score that the reference has no code for."""
    if selection.score == "update":
        return moved.update * moved.grad
    assert moved.momentum is not None  # checked before anything moved
    if selection.score == "momentum":
        return moved.momentum * moved.grad
    if selection.score != "nesterov":
        refuse_score("the reference", selection.score)
    return nesterov(rule, moved.momentum, moved.grad) * moved.grad


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
        return top_k(score, selection.k_of(d))
    sample = score.reshape(-1)[positions]
    sample = torch.where(torch.isnan(sample), -torch.inf, sample)
    rank = max(selection.k_of(sample.numel()), 1)
    return score >= sample.sort(descending=True).values[rank - 1]  # NaN >= x is false


def _bernoulli(selection: Selection, item: Item, draw: Draw) -> Tensor:
    param = item.param
    shape = list(param.shape) if selection.unit == "element" else [1] * param.dim()
    if selection.unit == "row" and param.dim():
        shape[0] = param.shape[0]
    first = 0 if item.shard is None else item.shard.first(selection.unit)
    assert first is not None, "a shard whose random numbers do not follow each other is stepped by kernels/sharded"
    numbers = uniform_bits(draw, item.address, math.prod(shape), offset=first, device=param.device)
    return (numbers < selection.random_limit).reshape(shape).expand(param.shape)


def select(selection: Selection, item: Item, rule: Rule, moved: Advanced, draw: Draw) -> Tensor:
    """The selected coordinates of one tensor: bool, shaped like the parameter.

    `moved` is as selections read it (`as_seen`). Raises a ValueError for a kind that the reference has no code for.
    """
    if selection.kind == "everything":
        return torch.ones_like(item.param, dtype=torch.bool)
    if selection.kind == "agreement":
        return _agreement(selection, moved)
    if selection.kind == "top_k":
        return _top_k(selection, item, rule, moved, draw)
    if selection.kind == "bernoulli":
        return _bernoulli(selection, item, draw)
    refuse_kind("the reference", "selection", selection.kind)
