"""Basis and Carried: the data of one rotated parameter, and the result of one refresh of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from selective.kernels import spec
from selective.preconditioner import Carry, Shape, State

MaskSpace = Literal["rotated", "original"]
Matrices = Callable[
    [list[int]], list[Tensor]
]  # gets indices of parameters, returns their gradients as matrices, not rotated


class PreconditionerError(RuntimeError):
    """Raised if a preconditioner raises, or returns something that does not fit its contract.

    The message says which values are those from before the step.
    """


@dataclass(frozen=True)
class Basis:
    """The preconditioner's state of one rotated parameter, and the parameter's place among the rotated ones."""

    shape: Shape  # of this rank's part
    device: torch.device
    state: State
    steps: Tensor  # int64 on the CPU: number of steps with a gradient
    skipped: Tensor  # int64 on its device: number of gradients that were not finite
    place: int
    whole: Shape  # of the whole matrix, over all ranks
    shard: spec.Shard | None = None
    gathers: bool = False  # True: the matrix is gathered to be rotated, and `state` is that of the whole on each rank


@dataclass
class Carried:
    """The result of refreshing one parameter's basis: the maps by which the base's moments are carried."""

    index: int
    maps: Carry
    valid: Tensor | None = None  # 0-d bool, False if the refresh was undone; None: it was not


@dataclass
class CarriedTogether:
    """The result of refreshing the bases of parameters of one shape: the maps of all their matrices, in order."""

    indices: list[int]
    maps: Carry
    valid: Tensor | None = None  # bool [count], False if a refresh was undone or gave nothing new; None: none was
