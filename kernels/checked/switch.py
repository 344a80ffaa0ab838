"""The switch: an environment variable, or a block of code."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

VARIABLE = "SELECTIVE_CHECK"


def _folder_of(value: str) -> str | None:
    """The folder for the file of a difference; None if the variable's value says that nothing is checked."""
    return None if value in ("", "0") else "." if value == "1" else value


_said = _folder_of(os.environ.get(VARIABLE, ""))
_folder: ContextVar[str | None] = ContextVar("folder", default=_said)


def is_on() -> bool:
    """True if steps are checked here and now."""
    return _folder.get() is not None


def folder() -> str:
    """The folder for the file of a difference."""
    return _folder.get() or "."


@contextmanager
def checked_steps(folder: str = ".") -> Iterator[None]:
    """Compare every step inside of the block (in this thread) with the reference, as `SELECTIVE_CHECK=1` does.

    The first difference that rounding can't explain raises a `KernelDifference`, and leaves a file in `folder` with
    the tensors of that step. A checked step takes the time of the reference, many times a kernel's, and waits for the
    device; it keeps copies of the parameters, gradients and state that kernels step, and some 300 bytes an element of
    the largest tensor.
    """
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


def refuse_shards() -> None:
    """Raise a ValueError for a step in which ranks ask each other."""
    raise ValueError(
        f"a checked step ({VARIABLE}) can't compare sharded parameters whose ranks ask each other in the step: that "
        f"would need a second set of collectives. Construct the optimizer with scope='local', or unset {VARIABLE}"
    )
