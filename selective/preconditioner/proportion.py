"""The sides of a matrix whose bases are too large to be worth it: too long, or out of proportion to the matrix."""

from __future__ import annotations

from typing import NamedTuple

from selective.preconditioner.data import LargeSide, Shape, Side

RATIO = 32.0
"""The default of `max_state_ratio`. A side of d elements of an m × n matrix keeps d² elements for its basis, and as
many for a running average: d / (the other side) or twice that, in multiples of the matrix. With averages that is 2 for
a square matrix, 8 for the long side of an MLP four times as wide as the model, 18 for a 3 × 3 convolution, and 32 for
keys and values of a sixteenth of the model's width. All of these are rotated. It is 1,024 for an adapter of rank 8 in a
model of width 4,096, whose side of 8 keeps 2 / 512."""


class Limits(NamedTuple):
    """The limits of an `Eigenbasis`, and the number of d × d matrices that it keeps for a side of length d."""

    max_dim: int
    max_state_ratio: float | None
    kept: int

    def allow(self, side: Side, shape: Shape) -> bool:
        """Return True if this side may be rotated."""
        return self._reason(side, shape) is None

    def left_out(self, side: Side, shape: Shape) -> LargeSide | None:
        """Return the side with the bytes that are saved, and the limit by which it is left out; None if it is not."""
        reason = self._reason(side, shape)
        return None if reason is None else self._large(side, shape, reason)

    def oversized(self, side: Side, shape: Shape) -> LargeSide | None:
        """Return the side with its bytes if it is rotated, and would not be with the default of `max_state_ratio`."""
        ratio = self._ratio(side, shape)
        if not self.allow(side, shape) or ratio <= RATIO:
            return None
        return self._large(side, shape, f"{ratio:,.0f} times its matrix")

    def _reason(self, side: Side, shape: Shape) -> str | None:
        if _length(side, shape) > self.max_dim:
            return f"max_dim={self.max_dim:,}"
        if self.max_state_ratio is not None and self._ratio(side, shape) > self.max_state_ratio:
            return f"max_state_ratio={self.max_state_ratio:g}"
        return None

    def _ratio(self, side: Side, shape: Shape) -> float:
        _, rows, columns = shape
        return self.kept * _length(side, shape) ** 2 / (rows * columns)

    def _large(self, side: Side, shape: Shape, why: str) -> LargeSide:
        length = _length(side, shape)
        return LargeSide(side, length, 4 * shape[0] * self.kept * length**2, why)


def _length(side: Side, shape: Shape) -> int:
    return shape[1] if side == "rows" else shape[2]
