"""The moments of a base: which entries of its state are carried into a new basis, how, and which can't be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from selective.base.base_facts import measured_moments
from selective.base.facts import BaseFacts
from selective.base.fused_rules import fused_rule
from selective.base.measure_moments import Moments
from selective.base.state_entries import dequantized, state_entries
from selective.preconditioner import Preconditioner, Shape
from selective.sharding.dtensor import local_of


def moments_of(base: Optimizer, group: Mapping[str, Any], facts: BaseFacts) -> Moments:
    """The kinds of the base's state entries. Of a base whose rule we know they are the rule's, else they are measured.

    Of one that can't be measured the momentum is known; other entries are taken for second moments.
    """
    rule = fused_rule(base)
    if rule is not None:
        return rule.moment_kinds
    measured = measured_moments(base, group)
    if facts.momentum_key is None or facts.momentum_key in measured.first:
        return measured
    return replace(measured, first=measured.first | {facts.momentum_key})


def check_moments(
    base: Optimizer, group: Mapping[str, Any], number: int, moments: Moments, preconditioner: Preconditioner
) -> None:
    """Refuse a base with a state entry that can't follow its parameter into a new basis."""
    if group.get("centered"):
        raise ValueError(
            f"SelectiveUpdate: {type(base).__name__} has centered=True: its variance is the difference of two "
            f"averages, which are not of the same space any more when a basis changes; take centered=False, or "
            f"preconditioner=None"
        )
    name = next(iter(moments.fixed), None)
    if name is not None and preconditioner.moves_moments():
        raise ValueError(
            f"SelectiveUpdate: {type(base).__name__} (param_groups[{number}]) can't be rotated: its state entry "
            f"{name!r} {moments.fixed[name]}, so it is no moment of the gradient and can't follow into a new basis. "
            f"Take a base that keeps averages of gradients and of their squares, such as AdamW; a preconditioner that "
            f"leaves moments where they are (carry='keep'); or preconditioner=None for this group"
        )


@dataclass(frozen=True, eq=False)
class Entry:
    """A state entry in the rotated space, of one parameter: the base's own tensor, and as which matrices it is read."""

    name: str
    tensor: Tensor
    shape: Shape


def entries_of(base: Optimizer, param: Tensor, moments: Moments, shape: Shape) -> list[Entry]:
    """The entries that follow their parameter into a new basis; none where one of them can't be read.

    Entries shaped like the parameter, and factors: statistics of its rows or of its columns (Adafactor's), with 1
    column or 1 row. A factor that is named after neither, and square enough to be either, is left alone. Codes that
    nobody can read (bitsandbytes) can't be carried; then the others stay as well, since moments of one coordinate
    belong together.
    """
    if param not in base.state:
        return []
    batch, rows, columns = shape
    local = local_of(param)
    named = moments.first | moments.second | moments.norms
    found: list[Entry] = []
    for name, stored in state_entries(base.state[param]):
        value = local_of(stored)
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        if not dequantized(value).is_floating_point():
            if name in named and value.numel() == local.numel():
                return []
            continue
        if value.shape == local.shape:
            found.append(Entry(name, value, shape))
        elif tuple(local.shape[-2:]) == (rows, columns):  # as the base sees it; not a convolution read as one matrix
            by_row, by_column = value.numel() == batch * rows, value.numel() == batch * columns
            if by_row and (not by_column or "row" in name):
                found.append(Entry(name, value, (batch, rows, 1)))
            elif by_column and (not by_row or "col" in name):
                found.append(Entry(name, value, (batch, 1, columns)))
    return found
