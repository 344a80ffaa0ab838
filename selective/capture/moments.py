"""The base's moments when the rotated space changes: first moments are rotated along, second moments may be permuted.

A first moment here is every entry shaped like the parameter that turns round with the gradient: the average of
gradients that policies read, and other sums of gradients or updates (`anatomy_odd`). Every other entry that is shaped
like the parameter, or like its rows or columns (Adafactor's factors), is taken for a second moment: it stays, or goes
into another order where the preconditioner says that the new basis is the old one in another order, roughly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.capture.anatomy import odd_entries
from selective.capture.anatomy_facts import Anatomy
from selective.capture.anatomy_probe import dequantized, state_entries
from selective.capture.fused import fused_rule
from selective.capture.layout import local_of
from selective.capture.rotation_basis import Carried
from selective.capture.rotation_checks import exact_products
from selective.preconditioner import Shape, as_matrix
from selective.preconditioner.linalg import Precision, identity_like, in_order, in_precision, per_matrix


def names_of_first(base: Optimizer, group: Mapping[str, Any], facts: Anatomy) -> frozenset[str]:
    """Names of the state entries that are first moments. Of a base whose rule we know, without trying it."""
    known = frozenset() if facts.momentum_key is None else frozenset({facts.momentum_key})
    return known if fused_rule(base) is not None else known | odd_entries(base, group)


def first_moments(base: Optimizer, param: Tensor, names: frozenset[str]) -> list[Tensor]:
    """The base's own tensors, which may be 8-bit; those that there are by now."""
    entries = state_entries(base.state[param]) if param in base.state else ()
    found = [v for k, v in entries if k in names and isinstance(v, Tensor) and v.shape == param.shape]
    return [local_of(v) for v in found]


def rewrite(
    moment: Tensor, shape: Shape, change: Callable[[Tensor], Tensor], valid: Tensor | None = None,
    precision: Precision = "float32",
) -> None:  # fmt: skip
    """moment <- change(moment), where `change` gets and returns float32 [batch, rows, columns]; rounded once.

    Nothing where `valid` (0-d bool) says no. `precision`: of the products that `change` makes.
    """
    plain = dequantized(moment)
    before = as_matrix(plain, shape)
    with exact_products(moment.device), in_precision(precision):
        changed = change(before)
    if valid is None:
        moment.copy_(changed.reshape(moment.shape).to(plain.dtype))
    elif plain is moment and before.data_ptr() == moment.data_ptr() and before.dtype == moment.dtype:
        torch.where(valid, changed, before, out=before)  # `before` is a view of the moment
    else:
        changed = torch.where(valid, changed, before)
        moment.copy_(changed.reshape(moment.shape).to(plain.dtype))


Around = Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]


def _as_it_is(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return change


def carry_first(
    moment: Tensor, shape: Shape, carried: Carried, around: Around = _as_it_is, precision: Precision = "float32"
) -> None:
    """A first moment into the new space: x <- left x right. `around`: for parts of a matrix that is gathered."""
    left, right = carried.maps.left, carried.maps.right

    def change(x: Tensor) -> Tensor:
        y = x if left is None else left @ x
        y = y if right is None else y @ right
        if precision == "float32" or len(x) == 1:
            return y
        maps = [map_ for map_ in (left, right) if map_ is not None]
        stays = torch.stack([(map_ == identity_like(map_)).flatten(1).all(1) for map_ in maps]).all(0)
        return torch.where(per_matrix(stays), x, y)  # an identity in TF32 would round it all the same

    if left is not None or right is not None:
        rewrite(moment, shape, around(change), carried.valid, precision)


def carry_second(
    base: Optimizer, param: Tensor, first: frozenset[str], shape: Shape, carried: Carried, around: Around = _as_it_is
) -> None:
    """Second moments into the new order, where there is one; `around` as for first ones."""
    rows, columns = carried.maps.rows, carried.maps.columns
    if (rows is None and columns is None) or param not in base.state:
        return
    for value, view in _second_moments(base, param, first, shape):

        def change(x: Tensor) -> Tensor:
            y = x
            if rows is not None and x.shape[1] > 1:
                y = in_order(y, rows, 1)
            if columns is not None and x.shape[2] > 1:
                y = in_order(y, columns)
            return y

        rewrite(value, view, around(change), carried.valid)


def _second_moments(
    base: Optimizer, param: Tensor, first: frozenset[str], shape: Shape
) -> Iterator[tuple[Tensor, Shape]]:
    """Tensor and [batch, rows, columns] of each entry in the rotated space that is no first moment.

    A factor has 1 row or 1 column; one that is named after neither, and square enough to be either, is left alone.
    """
    batch, rows, columns = shape
    entries = [(key, local_of(value)) for key, value in state_entries(base.state[param])]
    param = local_of(param)
    for key, value in entries:
        if key in first or not _is_real(value):
            continue
        if value.shape == param.shape:
            yield value, shape
        elif tuple(param.shape[-2:]) == (rows, columns):  # as the base sees it; not a convolution read as one matrix
            by_row, by_column = value.numel() == batch * rows, value.numel() == batch * columns
            if by_row and (not by_column or "row" in key):
                yield value, (batch, rows, 1)
            elif by_column and (not by_row or "col" in key):
                yield value, (batch, 1, columns)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and dequantized(value).is_floating_point()
