"""The coordinates of one tensor whose selection rounding may turn: both answers are right there.

Where an update cancels to almost nothing, its sign is a matter of the last bit, and so is the K-th of many scores that
are almost equal. Of a million elements there are a few. All others are decided by the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..reference.random import sample_positions
from ..reference.rules import Advanced
from ..reference.selections import score_of, select
from ..reference.top_k import top_k
from ..spec import Item, Selection, StepSpec
from .roundings import Errors, looked_at, near_zero


@dataclass
class Choices:
    """The reference's selection of one tensor, and the smallest and the largest ones that rounding allows."""

    chosen: Tensor
    least: Tensor
    most: Tensor

    @property
    def distinct(self) -> list[Tensor]:
        """Those that differ: one in most steps."""
        return [self.chosen] if torch.equal(self.least, self.most) else [self.chosen, self.least, self.most]


def product_may_turn(x: Tensor, error: Tensor, grad: Tensor, of_grad: Tensor) -> Tensor:
    """True where rounding may give x times the gradient another sign, or make it 0.

    A product that underflows is 0 here; kernels that look at the signs of its factors see more.
    """
    underflows = (x != 0) & (grad != 0) & ((x * grad).abs() < torch.finfo(x.dtype).tiny)
    return underflows | near_zero(x, error) | near_zero(grad, of_grad)


def choices_of(item: Item, spec: StepSpec, moved: Advanced, errors: Errors) -> Choices:
    """The coordinates that are selected, and those that might be.

    `item` has moved its moments, and `moved` is as selections read it.
    """
    selection, rule, draw = spec.selection, spec.rule, spec.draw
    if selection.kind == "function":
        return _by_function(selection, moved, errors)
    chosen = select(selection, item, rule, moved, draw)
    if selection.kind == "agreement":
        border = product_may_turn(*looked_at(selection, rule, moved, errors), moved.grad, errors.grad)
        if errors.turns is not None and selection.product == "update":
            border = border | errors.turns
        if selection.product == "previous_momentum" and bool(chosen.all()):
            border = torch.zeros_like(border)  # the first step is dense
        return Choices(chosen, chosen & ~border, chosen | border)
    if selection.kind == "top_k":
        return _top_k(item, spec, moved, errors, chosen)
    return Choices(chosen, chosen, chosen)


def _by_function(selection: Selection, moved: Advanced, errors: Errors) -> Choices:
    """The choices of a user's function, which is called with inputs that are as far off as rounding allows."""
    from .. import gpu  # it imports Triton, which such a function needs

    def called(way: float) -> Tensor:
        momentum, off = moved.momentum, way * errors.momentum
        update = moved.update + way * errors.update
        momentum = update if momentum is None else momentum + off
        grad = moved.grad + way * errors.grad
        return gpu.evaluate(selection, *(x.float() for x in (grad, update, momentum)))

    answers = [called(way) for way in (0.0, 1.0, -1.0)]
    together = torch.stack(answers)
    return Choices(answers[0], together.all(0), together.any(0))


def _top_k(item: Item, spec: StepSpec, moved: Advanced, errors: Errors, chosen: Tensor) -> Choices:
    selection, numel = spec.selection, chosen.numel()
    k = selection.k_of(numel)
    if k <= 0 or k >= numel:
        return Choices(chosen, chosen, chosen)
    score = score_of(selection, spec.rule, moved)
    factor, error = looked_at(selection, spec.rule, moved, errors)
    off = error * moved.grad.abs() + factor.abs() * errors.grad + 2 * torch.finfo(score.dtype).eps * score.abs()
    positions = None
    if selection.quantile == "sampled":
        positions = sample_positions(spec.draw, item.address, numel, score.device)
    if errors.turns is not None and selection.score == "update":
        off = torch.where(errors.turns, 2 * factor.abs().amax() * moved.grad.abs(), off)
    kth = partial(_kth, positions=positions, fraction=selection.fraction)
    low, high = kth(score - off), kth(score + off)
    border = (off > 0) & (score + off >= low) & (score - off <= high)  # False where the score is no number
    if positions is not None:
        return Choices(chosen, chosen & ~border, chosen | border)
    count = int(border.sum())  # so many of those that are equal to the K-th, exactly, may change places with these
    least, most = top_k(score, k - count) & ~border, top_k(score, k + count) | border
    return Choices(chosen, least & chosen, most | chosen)


def _kth(score: Tensor, positions: Tensor | None, fraction: float) -> Tensor:
    """The K-th largest score, of the whole tensor or of a sample of it."""
    flat = score.reshape(-1) if positions is None else score.reshape(-1)[positions]
    flat = torch.where(torch.isnan(flat), -torch.inf, flat)
    rank = max(int(fraction * flat.numel()), 1)
    return flat.sort(descending=True).values[rank - 1]
