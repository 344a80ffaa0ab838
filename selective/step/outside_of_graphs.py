"""A step that is called inside of a function that torch.compile compiles: it runs as it is, outside of the graphs.

Tracing it would break a graph at every look at a pointer, a number or a dictionary, and compile dozens of small frames.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

_REASON = (
    "SelectiveUpdate: step() runs outside of the graphs of torch.compile, because its kernels are fused already; "
    "compile the model, or forward and backward, and leave the step out"
)


def _run(step: Callable[..., Any], closure: Callable[[], Any] | None) -> Any:
    warnings.warn(_REASON, stacklevel=2)
    return step(closure)


_disabled: Callable[..., Any] | None = None


def prepare() -> None:
    """Mark the function that steps, so that the compiler leaves it alone.

    The compiler is imported with the first optimizer of torch that is built, and not for this.
    """
    global _disabled
    if _disabled is None and "torch._dynamo" in sys.modules:
        _disabled = torch.compiler.disable(_run, reason=_REASON)


def step_outside_of_graphs(step: Callable[..., Any], closure: Callable[[], Any] | None) -> Any:
    """Call `step(closure)` without compiling it. For a call that the compiler traces."""
    if _disabled is None:  # the optimizer was unpickled before the compiler was imported
        prepare()
    assert _disabled is not None
    return _disabled(step, closure)
