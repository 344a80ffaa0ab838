"""Matrix views: reading a parameter as matrices [batch, rows, columns]."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from selective.preconditioner.data import Shape

MatrixView = Literal[
    "matrices", "conv", "experts", "rows:2", "rows:3", "rows:4", "columns:2", "columns:3", "columns:4"
]  # The ways to read a parameter
VIEWS: tuple[str, ...] = get_args(MatrixView)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)


def check_matrix_view(view: object, where: str) -> MatrixView:
    """Return `view` if it is a matrix view.

    Args:
        view: the value to be checked.
        where: the beginning of the message, which says where the value was given.

    Raises:
        ValueError: it is none; the message lists all views.
    """
    if view not in VIEWS:
        raise ValueError(
            f"SelectiveUpdate: {where}matrix_view is {view!r}, must be 'matrices' (2-D parameters only), 'conv' "
            f"([out, in, ...] as one matrix [out, in * ...]), 'experts' ([..., m, n] as a batch of [m, n]), "
            f"'rows:2', 'rows:3' or 'rows:4' ([k * m, n] or [e, k * m, n] as matrices [m, n]), or 'columns:2', "
            f"'columns:3' or 'columns:4' ([m, k * n] or [e, m, k * n] as matrices [m, n])"
        )
    return view  # type: ignore[return-value]


def matrix_shape(param: Tensor, view: MatrixView) -> Shape | str:
    """Return the shape (batch, rows, columns) of a parameter as matrices, or the reason in words why it has none.

    A 2-D parameter is one matrix in every view but "rows:k" and "columns:k". In "rows:k", [k * m, n] is a batch of k
    matrices [m, n], and [e, k * m, n] a batch of e * k: the queries, keys and values of a joined projection, or the
    gates and values of stacked experts. "columns:k" reads [m, k * n] and [e, m, k * n] in the same way, for weights
    that are stored as [in, out], such as those of GPT-2; n is 2 or more there. "conv" reads [out, in, ...] as one
    matrix [out, in * ...], and "experts" reads [..., m, n] as a batch of matrices [m, n]. Parameters of other numbers
    of dimensions have no matrices. Neither have those of other dtypes than float32, bfloat16 and float16, nor tensor
    subclasses such as DTensor and quantised parameters.
    """
    if type(param) not in _PLAIN:
        return f"a {type(param).__name__}, and only plain tensors are rotated"
    if param.dtype not in DTYPES:
        return f"{str(param.dtype).removeprefix('torch.')}, and a basis is float32"
    if param.dim() < 2:
        return f"{param.dim()}-D, no matrix"
    if param.numel() == 0:
        return "empty"
    if view.startswith("rows:"):
        count = int(view.removeprefix("rows:"))
        rows, columns = param.shape[-2:]
        if param.dim() > 3 or rows % count:
            return f"{' x '.join(map(str, param.shape))}, no {count} matrices of equal shape one below the other"
        return param.numel() // (rows * columns) * count, rows // count, columns
    if view.startswith("columns:"):
        count = int(view.removeprefix("columns:"))
        rows, columns = param.shape[-2:]
        if param.dim() > 3 or columns % count or columns == count:
            return f"{' x '.join(map(str, param.shape))}, no {count} matrices of equal shape side by side"
        return param.numel() // (rows * columns) * count, rows, columns // count
    if param.dim() == 2:
        return 1, param.shape[0], param.shape[1]
    if view == "conv":
        return 1, param.shape[0], param.numel() // param.shape[0]
    if view == "experts":
        rows, columns = param.shape[-2:]
        return param.numel() // (rows * columns), rows, columns
    return f"{param.dim()}-D; matrix_view='conv' or 'experts' would say how it is read as matrices"


def as_matrix(x: Tensor, shape: Shape) -> Tensor:
    """Return `x` as float32 [batch, rows, columns]: a view if its dtype and memory allow, else a copy."""
    x = in_own_dtype(x.detach() if x.requires_grad else x, shape)
    return x if x.dtype == torch.float32 else x.to(torch.float32)


def in_own_dtype(x: Tensor, shape: Shape) -> Tensor:
    """Return `x` as [batch, rows, columns] in its own dtype: a view if its memory allows, else a copy."""
    count = _side_by_side(x.shape, shape)
    if count == 1:
        return x.reshape(shape)
    return x.unflatten(-1, (count, shape[2])).movedim(-2, -3).reshape(shape)


def from_matrices(x: Tensor, size: torch.Size) -> Tensor:
    """Return matrices [batch, rows, columns] as one tensor of their parameter's shape `size`. It undoes `as_matrix`."""
    batch, rows, columns = x.shape
    count = _side_by_side(size, (batch, rows, columns))
    if count == 1:
        return x.reshape(size)
    return x.reshape(*size[:-2], count, rows, columns).movedim(-3, -2).reshape(size)


def lies_in_order(size: torch.Size, shape: Shape) -> bool:
    """True if a contiguous tensor of this size lies in memory as its matrices do, one after the other."""
    return _side_by_side(size, shape) == 1


def _side_by_side(size: torch.Size, shape: Shape) -> int:
    """Return how many of the matrices of `shape` lie side by side in a tensor of `size`: 1 except for "columns:k".

    Both shapes together say it. Only in that view a tensor of 2 or 3 dimensions has the rows of one matrix, and the
    columns of several. Factors of second moments ([batch, rows] or [batch, columns]) have 1 column or 1 row as
    matrices, and are never taken for such a tensor.
    """
    batch, rows, columns = shape
    if batch == 1 or columns < 2 or len(size) not in (2, 3) or size[-2] != rows:
        return 1
    return size[-1] // columns
