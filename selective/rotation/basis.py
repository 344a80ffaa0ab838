"""What a rotation has of one parameter, and what it says of a refresh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from selective.kernels import spec
from selective.preconditioner import Carry, Shape, State

MaskSpace = Literal["rotated", "original"]
Matrices = Callable[[list[int]], list[Tensor]]  # the gradients of these parameters, not rotated, as matrices


class PreconditionerError(RuntimeError):
    """A preconditioner raised, or returned what does not fit. The message says what is as it was before the step."""


@dataclass(frozen=True)
class Basis:
    """What is kept of one rotated parameter, and where it stands among them."""

    shape: Shape
    device: torch.device
    state: State
    steps: Tensor  # int64 on the CPU: steps in which it had a gradient
    skipped: Tensor  # int64 on its device: gradients that were not finite
    place: int
    whole: Shape  # ... and `shape` what of it is on this rank
    shard: spec.Shard | None = None
    gathers: bool = False  # a shard that is rotated as a whole: then what `state` has is whole on each rank


@dataclass
class Carried:
    """One refresh, for the moments that follow it: the maps, and whether they count (0-d bool; None: they do)."""

    index: int
    maps: Carry
    valid: Tensor | None = None
