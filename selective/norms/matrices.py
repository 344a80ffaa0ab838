"""Parameters as matrices whose norm is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from selective.kernels import Matrices
from selective.preconditioner import MatrixView, Shape, matrix_shape
from selective.preconditioner.matrices import lies_in_order


def matrices_of(param: Tensor, view: MatrixView) -> Shape | str:
    """Return the shape (batch, rows, columns) of a whole parameter as matrices, or the reason why it has none.

    In contrast to a preconditioner, any real floating dtype will do, and a DTensor, too.
    """
    if not param.is_floating_point():
        return f"{str(param.dtype).removeprefix('torch.')}, and has no norm that is kept"
    return matrix_shape(torch.empty(param.shape, dtype=torch.float32, device="meta"), view)


def reading(size: torch.Size, shape: Shape) -> Matrices:
    """Return how the kernels read a parameter, or a rank's part of one, of this size.

    Args:
        size: of what is here.
        shape: of the whole parameter as matrices. One of which a part is here is one matrix.
    """
    batch, rows, columns = shape
    if size.numel() != batch * rows * columns:
        return Matrices(1, size[0], size[1])
    beside = 1 if lies_in_order(size, shape) else size[-1] // columns
    return Matrices(batch, rows, columns, beside)
