"""Checks of a preconditioner's results against its contract, with messages for the authors of preconditioners."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from selective.preconditioner import Carry, Preconditioner, Shape, State
from selective.preconditioner.matrices import DTYPES


def check_projected(results: Sequence[Tensor], shape: Shape, count: int) -> list[Tensor]:
    """Return the results of a projection as a list; refuse them unless there are `count` tensors of this shape."""
    tensors = list(results)
    if len(tensors) != count or any(y.shape != shape or y.dtype not in DTYPES for y in tensors):
        returned = [(tuple(y.shape), y.dtype) for y in tensors]
        raise ValueError(f"it returned {returned} for {count} float32 matrices of shape {shape}")
    return tensors


def check_states(before: Sequence[State], after: Sequence[State]) -> None:
    """Refuse states in which a tensor was replaced instead of being written in place."""
    for old, new in zip(before, after, strict=True):
        if new.keys() != old.keys() or any(new[key] is not old[key] for key in old):
            raise ValueError("it put another tensor into a state, which is lost: write into the tensors in place")


def check_report(report: object, count: int) -> None:
    """Refuse a report that is not a list of `count` dictionaries of 0-d tensors."""
    rows = list(report) if isinstance(report, (list, tuple)) else []
    tables = [row for row in rows if isinstance(row, dict)]
    if len(tables) != count or not all(
        isinstance(x, Tensor) and x.dim() == 0 for table in tables for x in table.values()
    ):
        raise ValueError(f"it has to return a list with a dictionary of 0-d tensors for each of {count} states")


def check_refreshed(carries: object, shapes: Sequence[Shape]) -> None:
    """Refuse the result of a refresh unless it has a `Carry` or None for each of these shapes."""
    if not isinstance(carries, list) or len(carries) != len(shapes):
        raise ValueError(f"it has to return a list with one entry for each of {len(shapes)} states: a Carry or None")
    if any(maps is not None and not isinstance(maps, Carry) for maps in carries):
        raise ValueError("it has to return a Carry or None for each state")
    for maps, shape in zip(carries, shapes, strict=True):
        if maps is not None:
            _check_carry(maps, shape)


def _check_carry(maps: Carry, shape: Shape) -> None:
    """Refuse maps of wrong shapes or dtypes, which would otherwise fail when half of the moments are carried."""
    batch, rows, columns = shape
    wanted = {
        "left": ((batch, rows, rows), torch.float32), "right": ((batch, columns, columns), torch.float32),
        "rows": ((batch, rows), torch.int64), "columns": ((batch, columns), torch.int64),
    }  # fmt: skip
    for name, (size, dtype) in wanted.items():
        value = getattr(maps, name)
        if value is not None and (tuple(value.shape), value.dtype) != (size, dtype):
            raise ValueError(f"its Carry has {name} as {value.dtype} {list(value.shape)}, must be {dtype} {list(size)}")


def exact_products(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without autocast, under which products of float32 matrices would be made in bfloat16."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def is_foreign(preconditioner: Preconditioner) -> bool:
    """True if the class is a user's, whose code may raise: then the parameters are copied, to be restored."""
    return not type(preconditioner).__module__.startswith("selective.")


def is_memory_of(y: Tensor, x: Tensor) -> bool:
    """True if `y` shares the memory of `x`: a projection may return its argument, which may be the parameter."""
    return y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


class Named:
    """A context without autocast in which an error is raised again as the one that `failure` makes of it.

    It is a class because a step enters several for each group.
    """

    def __init__(self, device: torch.device, failure: Callable[[Exception], Exception]) -> None:
        self.exact, self.failure = exact_products(device), failure

    def __enter__(self) -> None:
        self.exact.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.exact.__exit__(kind, error, trace)
        if isinstance(error, Exception):  # broad: a user's preconditioner may raise anything
            raise self.failure(error) from error
