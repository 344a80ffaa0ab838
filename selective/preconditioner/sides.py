"""Which sides of a matrix are rotated, by its shape alone."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from selective.preconditioner.base import Shape, Side
from selective.preconditioner.linalg import float32_products

Sides = Literal["one", "two", "rows", "columns", "unsharded"]


def rotated_sides(sides: Sides, shape: Shape, max_dim: int) -> tuple[Side, ...]:
    """None of vectors and empty tensors, and no side longer than `max_dim`.

    "one" is the smaller side; of a square matrix the columns, which is what "unsharded" means without a layout: of a
    matrix that is sharded by rows, each rank has whole rows, so that x Q needs no communication (`shards.py`).
    """
    batch, rows, columns = shape
    if batch == 0 or min(rows, columns) < 2:
        return ()
    if sides == "one":
        sides = "rows" if rows < columns else "columns"
    wanted: dict[Sides, tuple[Side, ...]] = {
        "two": ("rows", "columns"),
        "rows": ("rows",),
        "columns": ("columns",),
        "unsharded": ("columns",),
    }
    lengths: dict[Side, int] = {"rows": rows, "columns": columns}
    return tuple(side for side in wanted[sides] if lengths[side] <= max_dim)


@float32_products()
def gram(grad: Tensor, side: Side) -> Tensor:
    """G Gᵀ for the rows, Gᵀ G for the columns: [batch, n, n], in the gradient's own dtype."""
    return grad @ grad.mT if side == "rows" else grad.mT @ grad
