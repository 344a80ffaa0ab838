"""A Triton function that selects, called outside of a step."""

from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import _gpu, why_no_triton
from .spec import Selection


def evaluate_function(selection: Selection, grad: Tensor, update: Tensor, momentum: Tensor | None = None) -> Tensor:
    """Call a selection's Triton function on these elements: float32 tensors of one shape.

    Returns a bool tensor of that shape, true where the function selects. On a GPU it is compiled as in a step. Without
    a `momentum` the function gets the update in its place.

    Raises a ValueError for tensors of other dtypes or of several shapes, and Triton's own errors if the function does
    not compile.
    """
    return _gpu().evaluate(selection, grad, update, update if momentum is None else momentum)


def function_device() -> tuple[torch.device | None, str]:
    """The device that `evaluate_function` can run on here, and ""; None and the reason if there is none."""
    missing = why_no_triton()
    if missing is not None:
        return None, missing
    if _gpu().INTERPRETED:
        return torch.device("cpu"), ""
    if torch.cuda.is_available():
        return torch.device("cuda"), ""
    return None, "there is no CUDA device; with TRITON_INTERPRET=1 in the environment Triton interprets it on the CPU"
