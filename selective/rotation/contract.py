"""What a preconditioner has returned, held against its contract: with a user's own code the message is what helps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from selective.preconditioner import Carry, Preconditioner, Shape, State
from selective.preconditioner.matrices import DTYPES


def check_projected(made: Sequence[Tensor], shape: Shape, count: int) -> list[Tensor]:
    """What a projection has returned, as a list."""
    made = list(made)
    if len(made) != count or any(y.shape != shape or y.dtype not in DTYPES for y in made):
        found = [(tuple(y.shape), y.dtype) for y in made]
        raise ValueError(f"it returned {found} for {count} float32 matrices of shape {shape}")
    return made


def check_states(kept: Sequence[State], states: Sequence[State]) -> None:
    """The tensors that were handed in are written in place, and no others stand for them."""
    for ours, theirs in zip(kept, states, strict=True):
        if theirs.keys() != ours.keys() or any(theirs[key] is not ours[key] for key in ours):
            raise ValueError("it put another tensor into a state, which is lost: write into the tensors in place")


def check_report(said: object, count: int) -> None:
    """For each of these, 0-d tensors by name."""
    found = list(said) if isinstance(said, (list, tuple)) else []
    named = [one for one in found if isinstance(one, dict)]
    if len(named) != count or not all(isinstance(x, Tensor) and x.dim() == 0 for one in named for x in one.values()):
        raise ValueError(f"it has to return a list with a dictionary of 0-d tensors for each of {count} states")


def check_refreshed(made: object, shapes: Sequence[Shape]) -> None:
    """A carry, or None, for each of these."""
    if not isinstance(made, list) or len(made) != len(shapes):
        raise ValueError(f"it has to return a list with one entry for each of {len(shapes)} states: a Carry or None")
    if any(maps is not None and not isinstance(maps, Carry) for maps in made):
        raise ValueError("it has to return a Carry or None for each state")
    for maps, shape in zip(made, shapes, strict=True):
        if maps is not None:
            _check_carry(maps, shape)


def _check_carry(maps: Carry, shape: Shape) -> None:
    """Shapes and dtypes, which say on the host what would otherwise fail half-way through the moments."""
    batch, rows, columns = shape
    wanted = {
        "left": ((batch, rows, rows), torch.float32), "right": ((batch, columns, columns), torch.float32),
        "rows": ((batch, rows), torch.int64), "columns": ((batch, columns), torch.int64),
    }  # fmt: skip
    for name, (size, dtype) in wanted.items():
        value = getattr(maps, name)
        if value is not None and (tuple(value.shape), value.dtype) != (size, dtype):
            raise ValueError(f"its Carry has {name} as {value.dtype} {list(value.shape)}, must be {dtype} {list(size)}")


def exact_products(device: torch.device) -> torch.autocast:
    """Outside of a user's autocast region, where products of float32 matrices would be made in bfloat16."""
    return torch.autocast(device.type, enabled=False)


def is_foreign(preconditioner: Preconditioner) -> bool:
    """Whether it is somebody's own code, which may raise: then parameters are kept to be put back."""
    return not type(preconditioner).__module__.startswith("selective.")


def is_memory_of(y: Tensor, x: Tensor) -> bool:
    """Whether a projection has handed back its argument, which may be the parameter itself."""
    return y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
