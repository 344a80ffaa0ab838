"""Selections and strengths on one tensor whose step is already known: what a policy's own `mask` is made of."""

from __future__ import annotations

from torch import Tensor

from ..spec import Draw, Item, Rule, Selection, Strength
from .rules import Advanced
from .selective_step import _parts, _select
from .strengths import multipliers


def select(selection: Selection, item: Item, rule: Rule, moved: Advanced, draw: Draw) -> Tensor:
    """The selected coordinates, a bool tensor shaped like the parameter."""
    return _select(selection, item, rule, moved, draw)


def strength_of(
    strength: Strength, selected: Tensor, item: Item, moved: Advanced, draw: Draw
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The two multipliers (0-d float64) and the new state; `item.policy_state` itself is left as it is."""
    state = {key: value.clone() for key, value in item.policy_state.items()}
    parts = _parts(strength, selected, item, moved, draw)
    above, below = multipliers(strength, parts, state, selected.device)
    return above, below, state
