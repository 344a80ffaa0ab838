"""The arithmetic of norm control, on stacks of parameters of one shape.

Note [sums of norm control]: the new norm ‖W'‖ follows from three sums over a matrix, because W' = W + c·d:
‖W'‖² = ‖W‖² + 2c W·d + c²‖d‖². So a sharded matrix takes one all-reduce of three numbers, and is written once.
The sums are in float64, so that the norm does not drift over the steps of a run: their rounding, 1e-16, is far below
that of the float32 weights, which is unbiased.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from selective.preconditioner import MatrixView, Shape, matrix_shape
from selective.preconditioner.matrices import lies_in_order

EPS = 1e-12  # added to no norm; the least that is divided by
F64 = torch.float64


def shape_of_norms(param: Tensor, view: MatrixView) -> Shape | str:
    """Return the shape (batch, rows, columns) of a whole parameter as matrices, or the reason why it has none.

    In contrast to a preconditioner, any real floating dtype will do, and a DTensor, too.
    """
    if not param.is_floating_point():
        return f"{str(param.dtype).removeprefix('torch.')}, and has no norm that is kept"
    return matrix_shape(torch.empty(param.shape, dtype=torch.float32, device="meta"), view)


@dataclass(frozen=True)
class Blocks:
    """The reading of a stack [n, *size] of n parameters as matrices: their elements are `dims` of a view of it."""

    size: torch.Size  # of one parameter
    shape: Shape  # batch, rows, columns of one parameter

    def of(self, stack: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return a view of the stack, and the dimensions of it that one matrix extends over."""
        batch, rows, columns = self.shape
        if lies_in_order(self.size, self.shape):
            return stack.view(len(stack), batch, rows * columns), (2,)
        return stack.unflatten(-1, (self.size[-1] // columns, columns)), (-3, -1)


def sums(blocks: Blocks, old: Tensor, moved: Tensor) -> Tensor:
    """Return ‖W‖², W·d and ‖d‖² of each matrix, float64 [3, n, ...], of stacks W and d of parameters."""
    (w, dims), (d, _) = blocks.of(old), blocks.of(moved)
    square = [torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=F64).square() for x in (w, d)]
    return torch.stack([square[0], (w * d).sum(dim=dims, keepdim=True, dtype=F64), square[1]])


def turned_(blocks: Blocks, old: Tensor, moved: Tensor, of_whole: Tensor, rate: float | Tensor) -> Tensor:
    """Return W' · r / ‖W'‖ in the memory of `old`, where W' moves by `rate` times r along d.

    Args:
        blocks: how the stacks are read as matrices.
        old: W, the parameters before the step, float32 or float64 [n, *size].
        moved: d, what the step has added to them, alike.
        of_whole: the `sums` over the whole matrices.
        rate: relative to the norm; at least 0.
    """
    (w, _), (d, _) = blocks.of(old), blocks.of(moved)
    square, product, length = of_whole
    step = rate * square.sqrt() / length.sqrt().clamp_min(EPS)
    after = (square + 2 * step * product + step.square() * length).clamp_min(0).sqrt()
    shrink = square.sqrt() / after.clamp_min(EPS)
    w.mul_(shrink.to(w.dtype)).addcmul_(d, (shrink * step).to(w.dtype))
    return old
