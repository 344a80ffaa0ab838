"""The sums that a strength needs before anything can be applied, chunk by chunk or from the sample."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.rules import Advanced
from ..reference.strengths import Parts, multipliers, total
from ..spec import Item, Strength, refuse_kind
from .chunks import buffer
from .rules import Slice


class Gatherer:
    """Adds up one tensor's sums: float32 products, float64 sums, in fixed order."""

    def __init__(self, strength: Strength, positions: Tensor | None, peeked: Advanced | None) -> None:
        self.strength = strength
        self.positions, self.peeked = positions, peeked  # of the sample; None if the estimate is not sampled
        self.selected = self.first = self.second = self.third = 0.0

    @property
    def sampled(self) -> bool:
        return self.positions is not None

    def quantity(self, piece: Slice) -> Tensor:
        """The x whose norm is kept, up to its sign."""
        x = {"update": piece.minus_update, "momentum": piece.momentum, "gradient": piece.grad}[self.strength.of]
        assert x is not None
        return x

    def add(self, piece: Slice, selected: Tensor | None, count: int) -> None:
        """Add one chunk. `selected` is 1.0 where selected, else 0.0; None if everything is selected.

        `count` is the number of the selected; only mean_preserving reads it.
        """
        kind = self.strength.kind
        products = buffer("products", piece.grad.numel(), piece.grad.dtype)

        def sum_of(a: Tensor, b: Tensor) -> float:
            return float(torch.mul(a, b, out=products).sum(dtype=torch.float64))

        if kind == "alignment":
            m, g = piece.momentum, piece.grad
            assert m is not None
            self.first += sum_of(m, g)
            self.second += sum_of(m, m)
            self.third += sum_of(g, g)
        elif self.sampled:
            return
        elif kind == "mean_preserving":
            self.selected += count
        elif kind == "norm_preserving":
            x = self.quantity(piece)
            whole = sum_of(x, x)
            chosen = whole if selected is None else float(products.mul_(selected).sum(dtype=torch.float64))
            self.first += chosen
            self.second += whole - chosen  # float64 sums of float32 products: what cancels is 1e-16 of the whole
        elif kind != "fixed":  # which needs no sums, and comes here where a control needs a pass of its own
            refuse_kind("the CPU", "strength", kind)

    def _sample_parts(self, marks: Tensor | None) -> Parts:
        assert self.positions is not None
        assert self.peeked is not None
        n = self.positions.numel()
        chosen = (
            torch.ones(n, dtype=torch.bool, device="cpu")
            if marks is None
            else marks.index_select(0, self.positions) != 0
        )
        if self.strength.kind == "mean_preserving":
            return Parts(n, selected=total(chosen))
        moved = self.peeked
        x = {"update": moved.update, "momentum": moved.momentum, "gradient": moved.grad}[self.strength.of]
        assert x is not None
        squares = x * x
        return Parts(
            n,
            selected_sq=total(torch.where(chosen, squares, 0.0)),
            rest_sq=total(torch.where(chosen, 0.0, squares)),
        )

    def multipliers(self, item: Item, marks: Tensor | None) -> tuple[float, float]:
        """The multipliers of the selected and of the rest.

        `marks` (uint8) is 1 where selected, of the whole tensor; it is read only if the estimate is sampled.
        """
        if self.sampled:
            parts = self._sample_parts(marks)
        else:
            sums = [self.selected, self.first, self.second, self.third]
            values = torch.tensor(sums, dtype=torch.float64, device="cpu")
            count, first, second, third = values.unbind()
            parts = Parts(
                item.param.numel(), selected=count, selected_sq=first, rest_sq=second,
                dot=first, momentum_sq=second, grad_sq=third,
            )  # fmt: skip
        selected, rest = multipliers(self.strength, parts, item.policy_state, item.param.device)
        return float(selected), float(rest)
