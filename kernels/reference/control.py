"""The matched random control: as many coordinates as were selected, at their multipliers, but random ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import Control, Draw
from .random import ranking_bits
from .strengths import Pair, total


def random_subset(selected: Tensor, still: Tensor | None, draw: Draw, address: int) -> Tensor:
    """Select as many coordinates as `selected` has: those with the largest random numbers. Bool, of the same shape.

    Equal numbers go to the lower flat (row-major) index. Coordinates that stand still come after all others, because
    to select one has no effect. The sort is stable and never waits for the device.
    """
    numbers = ranking_bits(draw, address, selected.numel(), device=selected.device)
    if still is not None:
        numbers = torch.where(still.reshape(-1), -1, numbers)
    order = numbers.argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device)
    return (rank < selected.sum()).reshape(selected.shape)


def scale_of(control: Control, wanted: Tensor, have: Tensor) -> Tensor:
    """The factor on both multipliers, 0-d float64, that makes the control's norm that of its policy.

    `wanted` and `have` are the sums of (mask u)^2 of the policy and of the control. The factor is 1 if the control's
    sum is 0 or a sum is not finite: one NaN, or a square that overflows, must not reach every coordinate.
    """
    possible = (have > 0) & torch.isfinite(wanted + have)
    ratio = (wanted / torch.where(possible, have, 1.0)).sqrt().clamp(max=control.cap)
    return torch.where(possible, ratio, 1.0)


def matched(
    control: Control, selected: Tensor, pair: Pair, update: Tensor, still: Tensor | None, draw: Draw, address: int
) -> tuple[Tensor, Pair]:
    """The control's selection and multipliers, from those (`selected`, `pair`) of the policy that it controls."""
    ours = random_subset(selected, still, draw, address)
    return ours, scaled(control, selected, ours, pair, update, still)


def scaled(control: Control, selected: Tensor, ours: Tensor, pair: Pair, update: Tensor, still: Tensor | None) -> Pair:
    """The multipliers of a control that selects `ours`, from those (`pair`) of its policy, which selects `selected`."""
    if not control.norm:
        return pair
    on_selected, on_rest = pair
    squares = update * update if still is None else torch.where(still, 0.0, update * update)

    def masked_sq(chosen: Tensor) -> Tensor:
        inside = total(torch.where(chosen, squares, 0.0))
        return on_selected * on_selected * inside + on_rest * on_rest * total(torch.where(chosen, 0.0, squares))

    scale = scale_of(control, masked_sq(selected), masked_sq(ours))
    return on_selected * scale, on_rest * scale
