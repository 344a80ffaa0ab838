"""How a parameter becomes matrices: [batch, rows, columns], a view of it wherever its memory allows."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from selective.preconditioner.base import Shape

MatrixView = Literal[
    "matrices", "conv", "experts", "rows:2", "rows:3", "rows:4"
]  # How parameters are read as matrices.
VIEWS: tuple[str, ...] = get_args(MatrixView)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)


def check_matrix_view(view: object, where: str) -> MatrixView:
    """`view` as it is, if it is one; a ValueError that says what there is."""
    if view not in VIEWS:
        raise ValueError(
            f"SelectiveUpdate: {where}matrix_view is {view!r}, must be 'matrices' (2-D parameters only), 'conv' "
            f"([out, in, ...] as one matrix [out, in * ...]), 'experts' ([..., m, n] as a batch of [m, n]) or "
            f"'rows:2', 'rows:3' or 'rows:4' ([k * m, n] or [e, k * m, n] as matrices [m, n])"
        )
    return view  # type: ignore[return-value]


def matrix_shape(param: Tensor, view: MatrixView) -> Shape | str:
    """[batch, rows, columns] of a parameter; where it is none, the reason in words.

    2-D parameters are one matrix in every view but "rows:k", where [k * m, n] is a batch of k matrices [m, n], and
    [e, k * m, n] one of e * k: queries, keys and values of a joined projection, gates and values of stacked experts.
    "conv": [out, in, ...] is one matrix [out, in * ...]. "experts": [..., m, n] is a batch of matrices [m, n]. Others
    are left alone, and so are dtypes and classes of tensor in which a product with a float32 basis is not to be had:
    float64, complex, DTensor, quantised parameters.
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
    if param.dim() == 2:
        return 1, param.shape[0], param.shape[1]
    if view == "conv":
        return 1, param.shape[0], param.numel() // param.shape[0]
    if view == "experts":
        rows, columns = param.shape[-2:]
        return param.numel() // (rows * columns), rows, columns
    return f"{param.dim()}-D; matrix_view='conv' or 'experts' would say how it is read as matrices"


def as_matrix(x: Tensor, shape: Shape) -> Tensor:
    """`x` as float32 [batch, rows, columns]: itself where its dtype and memory allow, else a copy."""
    x = (x.detach() if x.requires_grad else x).reshape(shape)
    return x if x.dtype == torch.float32 else x.to(torch.float32)
