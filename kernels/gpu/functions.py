"""A user's own function of (gradient, update, momentum) as a selection: compiled once, and evaluated by itself."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec import Selection
from .device import config
from .device.config import Config
from .device.selections import by_function
from .launch import on, run
from .tables import cdiv

BLOCK = 1024


@functools.cache  # one for each function, so that what was compiled of it is found again
def jitted(function: Callable[..., Any]) -> Any:
    """The function as a Triton function, always the same object; a Triton function is returned as it is.

    In the interpreter a plain function is returned as it is, too: the interpreter needs `triton.language` in the
    function's module.

    Raises a ValueError if the function's source can't be read.
    """
    if INTERPRETED or hasattr(function, "fn"):
        return function
    try:
        return triton.jit(function)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the source of {function.__qualname__} can't be read, and Triton compiles source: define it in a file or "
            f"in a notebook's cell, not with exec ({error})"
        ) from error


@triton.jit
def _evaluate_kernel(
    grad_ptr, update_ptr, momentum_ptr, row_ptr, chosen_ptr, numel,
    FUNCTION: tl.constexpr, CFG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """chosen <- FUNCTION(grad, update, momentum, numbers), called as a step calls it.

    Reads 12 bytes an element and writes one. `row_ptr` is a tensor's row of numbers.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    g = tl.load(grad_ptr + offs, mask=mask, other=0.0)
    u = tl.load(update_ptr + offs, mask=mask, other=0.0)
    m = tl.load(momentum_ptr + offs, mask=mask, other=0.0)
    chosen = by_function(g, u, m, row_ptr, FUNCTION, CFG)
    tl.store(chosen_ptr + offs, chosen.to(tl.int8), mask=mask)


INTERPRETED = not isinstance(_evaluate_kernel, triton.JITFunction)  # TRITON_INTERPRET: on CPU tensors, by numpy


def evaluate(selection: Selection, grad: Tensor, update: Tensor, momentum: Tensor) -> Tensor:
    """Call the selection's function on float32 tensors of one shape: a bool tensor of that shape, true where selected.

    Raises a ValueError for tensors of other dtypes or of several shapes.
    """
    tensors = (grad, update, momentum)
    if {(x.shape, x.dtype) for x in tensors} != {(grad.shape, torch.float32)}:
        given = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in tensors)
        raise ValueError(f"a function is evaluated on float32 tensors of one shape; found {given}")
    cfg = Config(
        rule="given", param=None, grad=tl.float32, first=tl.float32, second=None, third=tl.float32, fourth=None,
        block=BLOCK, selection="function", arguments=len(selection.numbers),
    )  # fmt: skip
    row = torch.zeros(config.NUMBERS.value, dtype=torch.float32, device="cpu")
    row[config.USER.value : config.USER.value + len(selection.numbers)] = torch.tensor(
        selection.numbers, dtype=torch.float32, device="cpu"
    )
    chosen = torch.empty(grad.shape, dtype=torch.int8, device=grad.device)
    assert selection.function is not None
    with on(grad.device), warnings.catch_warnings():
        if INTERPRETED:  # numpy warns of NaN and infinities, which are no error
            warnings.simplefilter("ignore", RuntimeWarning)
        run(_evaluate_kernel, cdiv(grad.numel(), BLOCK), *(x.contiguous() for x in tensors), row.to(grad.device),
            chosen, grad.numel(), FUNCTION=jitted(selection.function), CFG=cfg, BLOCK=BLOCK)  # fmt: skip
    return chosen.bool()
