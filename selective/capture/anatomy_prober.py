"""One base and group, its stand-ins, and the runs that several questions share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.capture.anatomy_clone import StepFailed
from selective.capture.anatomy_probe import LR, STEPS, Grads, Run, run, stand_in_shape, values
from selective.capture.lazy import initialized

DECAY = 0.5  # large, so that decay is not small beside the gradient
LARGE, SMALL, SIZABLE = 12, 6, 16  # elements of a stand-in, as powers of 2; how many times those a state may have
LOW = (torch.float16, torch.bfloat16)
# Rounding of ten steps, in units of eps·max(|p|, |u|): measured at most 4 where the update does not look at the
# parameter. The weakest dependence met (Prodigy's, relative 2e-6) is nine orders above in float64.
ROUNDING = 256.0


class Prober:
    """Steps twins of `base` on stand-ins for the parameters of `group`. Used inside `unnoticed()`."""

    def __init__(self, base: Optimizer, group: Mapping[str, Any]) -> None:
        params = initialized(group["params"])
        self.base, self.group = base, group
        self.ndims = sorted({p.ndim for p in params}) or [2]
        device = params[0].device if params else torch.device("cpu")
        self.device = torch.device("cpu") if device.type == "meta" else device
        self.low = sorted({p.dtype for p in params} & set(LOW), key=str)
        self.writes_grad = self.clears_grad = self.construct = False
        self.prepare(torch.float64, SMALL)

    def prepare(self, dtype: torch.dtype, power: int) -> None:
        """Stand-ins of 2^`power` elements, to be stepped in `dtype`, and their gradients."""
        self.dtype, self.shapes = dtype, [stand_in_shape(n, power) for n in self.ndims]
        # RMS 0.02 and 0.1: LAMB's clamp at a norm of 10 is not reached, Adafactor's floor of 1e-3 is passed.
        self.small, self.large = values(self.shapes, 1, 0.02), values(self.shapes, 2, 0.1)
        self.zeros = [torch.zeros_like(x) for x in self.small]
        series = [values(self.shapes, 10 + t, 0.1 * (1 + t % 3), spread=1.0) for t in range(STEPS)]
        self.grads: Grads = lambda t, i, p: series[t][i]

    def run(self, starts: list[Tensor], grads: Grads | None = None, *, decay: float = 0.0, **options: Any) -> Run:
        overrides = {"lr": options.pop("lr", LR), "weight_decay": decay}
        options = {"dtype": self.dtype, "construct": self.construct, **options}
        record = run(
            self.base, self.group, starts, grads or self.grads, device=self.device, overrides=overrides, **options
        )
        self.writes_grad |= record.writes_grad
        self.clears_grad |= record.clears_grad
        return record

    def find_who_makes_state(self) -> None:
        """Step a twin once; where an entry is missing, have the constructor make the state from now on."""
        try:
            self.run(self.small, steps=1)
        except StepFailed as error:
            if not isinstance(error.__cause__, KeyError):
                raise
            self.construct = True

    def eps(self, record: Run) -> float:
        """Of the arithmetic that the class used: some compute in float32 whatever the parameter's dtype is."""
        last = record.params[-1]
        coarse = self.dtype != torch.float64 or all(torch.equal(p, p.float().double()) for p in last)
        return torch.finfo(torch.float32 if coarse else torch.float64).eps

    @property
    def maximize(self) -> bool:
        """Whether the base climbs: an option of the group, or an attribute of the base (pytorch_optimizer)."""
        return bool(self.group.get("maximize", getattr(self.base, "maximize", False)))


def largest(x: Tensor) -> float:
    """The largest absolute value; 0 for an empty tensor."""
    return float(x.abs().max()) if x.numel() else 0.0


def cosine(x: Tensor, y: Tensor) -> float:
    """Of the angle between two flat tensors; 0 where either is zero."""
    norms = float(x.norm() * y.norm())
    return float(x @ y) / norms if norms > 0 else 0.0
