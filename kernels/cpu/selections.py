"""Selections of one chunk, as 1.0 and 0.0: all kinds but top-K, which needs the whole tensor.

Results are floats, because operations whose result is bool are five times slower (torch 2.13).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.random import uniform_bits
from ..reference.rules import nesterov
from ..spec import Item, Rule, Selection, StepSpec, refuse_kind, refuse_score
from . import random as numbers
from .chunks import Flat, buffer, count_ones, spans
from .rules import Slice


def negated_score(selection: Selection, rule: Rule, piece: Slice, out: Tensor) -> Tensor:
    """Write t = -score of a chunk to `out`, for the thresholds. Raises a ValueError for a score it has no code for."""
    if selection.score == "update":
        return torch.mul(piece.minus_update, piece.grad, out=out)
    assert piece.momentum is not None
    x = piece.momentum
    if selection.score == "nesterov":
        x = nesterov(rule, piece.momentum, piece.grad)
    elif selection.score != "momentum":
        refuse_score("the CPU", selection.score)
    return torch.mul(x, piece.grad, out=out).neg_()


def _anything(tensor: Tensor | None) -> bool:
    return tensor is not None and any(bool(tensor[a:b].any()) for a, b in spans(tensor.numel()))


class Selector:
    """Selects in the chunks of one tensor. Made before the moments move: it looks at the momentum before the step."""

    def __init__(self, spec: StepSpec, item: Item, flat: Flat) -> None:
        selection, draw = spec.selection, spec.draw
        self.selection, self.item, self.draw = selection, item, draw
        self.keep_previous = spec.keeps_previous
        # A control asks which coordinates stand still, by the product that an agreement is about.
        self.keep_product = selection.control is not None and spec.strength.still
        self.product: Tensor | None = None  # -u g of the last chunk, if it is kept
        self.counts_by_sign = selection.kind == "agreement" and selection.product == "update"
        self.everything = selection.kind == "everything"
        if self.keep_previous:
            name = spec.rule.previous_momentum
            self.everything = not _anything(None if name is None else flat.state.get(name))
        self.limit = selection.random_limit
        self.first = 0  # the number of the first element or row in the whole tensor
        if selection.kind == "bernoulli" and item.shard is not None:
            first = item.shard.first(selection.unit)
            assert first is not None, "a shard whose random numbers do not follow each other goes to kernels/sharded"
            self.first = first
        self.units: Tensor | None = None  # bernoulli: 1.0 and 0.0 of each row, or of the tensor
        if selection.kind == "bernoulli" and selection.unit != "element":
            rows = item.param.shape[0] if selection.unit == "row" and item.param.dim() else 1
            self.units = (uniform_bits(draw, item.address, rows, offset=self.first) < self.limit).float()

    def __call__(self, start: int, end: int, piece: Slice, out: Tensor) -> Tensor | None:
        """Write 1.0 where selected, else 0.0, to `out` and return it; return None if everything is selected."""
        if self.everything:
            return None
        if self.selection.kind == "bernoulli":
            return self._bernoulli(start, end, out)
        if self.selection.kind == "agreement":
            return self._agreement(piece, out)
        refuse_kind("the CPU", "selection", self.selection.kind)

    def counts(self, piece: Slice) -> tuple[int, int]:
        """The numbers of coordinates of a chunk that are selected, and that do not stand still.

        Of an agreement with the update, where nothing else is asked of its selection.
        """
        n, dtype = piece.grad.numel(), piece.grad.dtype
        product = torch.mul(piece.minus_update, piece.grad, out=buffer("product", n, dtype))
        signs = torch.sign(product, out=buffer("selected", n, dtype))
        if float(torch.dot(signs, signs)) == n:  # no zero, and no NaN, whose sign is 0: two operations fewer
            return (n - int(signs.sum())) // 2, n
        selected = count_ones(self._agreement(piece, signs))
        return selected, count_ones(torch.ne(product, 0, out=product))

    def _agreement(self, piece: Slice, out: Tensor) -> Tensor:
        strict, product = self.selection.strict, self.selection.product
        if product == "update":  # d = -u turns the comparison around
            self.product = buffer("product", out.numel(), out.dtype) if self.keep_product else out
            torch.mul(piece.minus_update, piece.grad, out=self.product)
            return (torch.lt if strict else torch.le)(self.product, 0, out=out)
        x = piece.momentum if product == "momentum" else piece.previous
        assert x is not None
        torch.mul(x, piece.grad, out=out)
        return out.gt_(0) if strict else out.ge_(0)

    def _bernoulli(self, start: int, end: int, out: Tensor) -> Tensor:
        count = end - start
        if self.units is not None:
            length = max(self.item.param.numel() // self.units.numel(), 1)
            rows = self.units[start // length : (end - 1) // length + 1].repeat_interleave(length)
            return out.copy_(rows[start % length : start % length + count])
        hashes = numbers.unfinished(self.draw, self.item.address, start + self.first, count)
        return out.copy_(numbers.finish_(hashes).lt_(self.limit))
