"""Strengths of one whole tensor: from the selected coordinates to the multipliers of the selected and of the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..spec import Draw, Item, Strength, refuse_kind
from .random import sample_positions
from .rules import Advanced

Pair = tuple[Tensor, Tensor]  # the multipliers of the selected and of the rest, 0-d float64


@dataclass
class Parts:
    """The sums that a strength is made of: 0-d float64 tensors; None for those that the strength does not ask for."""

    numel: int | Tensor  # of the sample if the estimate is sampled; a tensor if these are the sums of many tensors
    selected: Tensor | None = None
    selected_sq: Tensor | None = None  # sum of x^2 over the selected
    rest_sq: Tensor | None = None  # sum of x^2 over the others
    dot: Tensor | None = None  # alignment: m . g
    momentum_sq: Tensor | None = None
    grad_sq: Tensor | None = None


def total(x: Tensor) -> Tensor:
    """The sum in float64, 0-d."""
    return x.sum(dtype=torch.float64)


def parts_of(strength: Strength, selected: Tensor, item: Item, moved: Advanced, draw: Draw) -> Parts:
    """The sums that this strength is made of: over the sample where its estimate is sampled, else over the tensor."""
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


def _need(x: Tensor | None) -> Tensor:
    if x is None:
        raise AssertionError("a strength asked for a sum that was not computed")
    return x


def _mean_preserving(strength: Strength, parts: Parts) -> Tensor:
    count = _need(parts.selected)
    numel = parts.numel.clamp(min=1) if isinstance(parts.numel, Tensor) else max(parts.numel, 1)
    share = count / numel
    value = (1 - strength.rest * (1 - share)) / share.clamp(min=0.5 / numel)  # never 0 / 0
    return torch.where(count > 0, value.clamp(max=strength.cap), 1.0)


def _norm_preserving(strength: Strength, parts: Parts) -> Tensor:
    selected_sq, rest_sq = _need(parts.selected_sq), _need(parts.rest_sq)
    wanted = (selected_sq + rest_sq - strength.rest**2 * rest_sq).clamp(min=0)
    nothing = selected_sq == 0
    value = (wanted / torch.where(nothing, 1.0, selected_sq)).sqrt().clamp(max=strength.cap)
    # A square that overflows, or one NaN, would otherwise reach every coordinate of the tensor.
    return torch.where(nothing | ~torch.isfinite(selected_sq + rest_sq), 1.0, value)


def _alignment(strength: Strength, parts: Parts, state: dict[str, Tensor]) -> Tensor:
    dot, norms = _need(parts.dot), _need(parts.momentum_sq).sqrt() * _need(parts.grad_sq).sqrt()
    nothing = norms == 0
    cosine = torch.where(nothing, 0.0, dot / torch.where(nothing, 1.0, norms))
    cosine = torch.where(torch.isfinite(cosine), cosine, 0.0)  # else the average would be NaN from now on
    if "average" not in state:
        state["average"] = torch.ones((), dtype=torch.float32, device=dot.device)
    average = state["average"]
    new = strength.smoothing * average.to(torch.float64)
    average.copy_(new + (1 - strength.smoothing) * torch.sigmoid(cosine / strength.temperature))
    return average.to(torch.float64)


def multipliers(strength: Strength, parts: Parts, state: dict[str, Tensor], device: torch.device) -> Pair:
    """The multipliers of the selected and the rest, 0-d float64 on `device`. Alignment moves its average in `state`."""
    rest = torch.full((), strength.rest, dtype=torch.float64, device=device)
    if strength.kind == "fixed":
        return torch.full((), strength.selected, dtype=torch.float64, device=device), rest
    if strength.kind == "mean_preserving":
        return _mean_preserving(strength, parts), rest
    if strength.kind == "norm_preserving":
        return _norm_preserving(strength, parts), rest
    if strength.kind == "alignment":
        return _alignment(strength, parts, state), rest
    refuse_kind("the reference", "strength", strength.kind)


def strength_of(
    strength: Strength, selected: Tensor, item: Item, moved: Advanced, draw: Draw
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The two multipliers (0-d float64) and the new state; `item.policy_state` itself is not changed.

    For a policy's own `mask`, whose step is already known.
    """
    state = {key: value.clone() for key, value in item.policy_state.items()}
    parts = parts_of(strength, selected, item, moved, draw)
    return *multipliers(strength, parts, state, selected.device), state
