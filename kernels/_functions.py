"""A Triton function that selects, outside of a step: where it can run, and what it says by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import _gpu, why_no_triton
from .spec import Selection


def evaluate_function(selection: Selection, grad: Tensor, update: Tensor, momentum: Tensor | None = None) -> Tensor:
    """What a selection's Triton function says of these float32 elements, by itself: a bool tensor shaped like them.

    On a GPU it is compiled as it is in a step. Raises what Triton raises where it can't be.
    """
    return _gpu().evaluate(selection, grad, update, update if momentum is None else momentum)


def function_device() -> tuple[torch.device | None, str]:
    """Where `evaluate_function` can run here; or None, and why it can't."""
    missing = why_no_triton()
    if missing is not None:
        return None, missing
    if _gpu().INTERPRETED:
        return torch.device("cpu"), ""
    if torch.cuda.is_available():
        return torch.device("cuda"), ""
    return None, "there is no CUDA device; with TRITON_INTERPRET=1 in the environment Triton interprets it on the CPU"
