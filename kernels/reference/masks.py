"""Selections and strengths on one tensor whose step is already known: what a policy's own `mask` is made of."""

from __future__ import annotations

from torch import Tensor

from ..spec import Draw, Item, Strength
from .rules import Advanced
from .selective_step import parts_of, score_of, select
from .strengths import multipliers


def strength_of(
    strength: Strength, selected: Tensor, item: Item, moved: Advanced, draw: Draw
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The two multipliers (0-d float64) and the new state; `item.policy_state` itself is left as it is."""
    state = {key: value.clone() for key, value in item.policy_state.items()}
    parts = parts_of(strength, selected, item, moved, draw)
    above, below = multipliers(strength, parts, state, selected.device)
    return above, below, state


__all__ = ["score_of", "select", "strength_of"]
