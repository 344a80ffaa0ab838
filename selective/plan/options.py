"""The options of an optimizer: its arguments beside base, policy, preconditioner and seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from selective.capture.choose import CaptureName
from selective.rotation.basis import MaskSpace

OnNonfinite = Literal["ignore", "skip", "raise"]
Scope = Literal["global", "local"]
Graph = Literal["auto", False]


@dataclass(frozen=True)
class Options:
    """The arguments of `SelectiveUpdate` that hold for all groups; its docstring says what each of them does."""

    capture: CaptureName = "auto"
    momentum_beta: float | None = None
    on_nonfinite: OnNonfinite = "ignore"
    statistics: bool = True
    rounding: bool = False  # stochastic, of low-precision parameters
    scope: Scope = "global"
    mask_space: MaskSpace = "rotated"
    graph: Graph = "auto"  # CUDA graphs of our own

    @property
    def keeps_momentum(self) -> bool:
        """True if the wrapper keeps a momentum of its own."""
        return self.momentum_beta is not None
