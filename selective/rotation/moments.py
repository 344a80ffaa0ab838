"""The state entries of a base that are carried into a new basis, and the refusal of those that cannot be."""

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
    """Return the kinds of the base's state entries: those of its fused rule, or else the measured ones.

    If the measurement does not find the momentum that is known from `facts`, it is added to the first moments.
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
    """Refuse a base with a state entry that cannot be carried into a new basis.

    Raises:
        ValueError: the base has such an entry, and the preconditioner changes the basis of moments.
    """
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
    """A state entry of one parameter in the rotated space: the base's own tensor, and its shape as matrices."""

    name: str
    tensor: Tensor
    shape: Shape
    is_norm: bool = False  # True: it grows with the gradient, and is carried as the root of a second moment


def entries_of(base: Optimizer, param: Tensor, moments: Moments, shape: Shape) -> list[Entry]:
    """Return the entries that are carried into a new basis; none if one of them cannot be read.

    These are the entries shaped like the parameter, and factors: statistics of the rows or of the columns
    (Adafactor's), which have 1 column or 1 row. A factor that could be of either side by its size is taken for one only
    if its name says which; otherwise it is not carried. Integer codes without a `dequantize()` (bitsandbytes) cannot be
    read. Then no entry is carried, since the moments of one coordinate belong together.
    """
    if param not in base.state:
        return []
    batch, rows, columns = shape
    local = local_of(param)
    named = moments.first | moments.second | moments.norms
    entries: list[Entry] = []
    for name, stored in state_entries(base.state[param]):
        value = local_of(stored)
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        if not dequantized(value).is_floating_point():
            if name in named and value.numel() == local.numel():
                return []
            continue
        is_norm = name in moments.norms
        if value.shape == local.shape:
            entries.append(Entry(name, value, shape, is_norm))
        elif tuple(local.shape[-2:]) == (rows, columns):  # the base sees this matrix too, unlike that of a convolution
            by_row, by_column = value.numel() == batch * rows, value.numel() == batch * columns
            if by_row and (not by_column or "row" in name):
                entries.append(Entry(name, value, (batch, rows, 1), is_norm))
            elif by_column and (not by_row or "col" in name):
                entries.append(Entry(name, value, (batch, 1, columns), is_norm))
    return entries
