"""What the captures share: the context of a step, one group's job in it, and running the base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.capture.anatomy import Anatomy
from selective.capture.described import has_own_code
from selective.capture.lists import copies
from selective.kernels import Exchange, spec
from selective.policies import Policy
from selective.statistics import Report

LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Parameter:
    """A parameter with what identifies it: its index in the optimizer (for randomness) and its name (for people)."""

    tensor: Tensor
    address: int
    name: str
    group: int  # index of its parameter group


@dataclass
class StepContext:
    """What one step of the wrapper gives to every group's job."""

    base: Optimizer
    draw: spec.Draw
    own_state: Callable[[Parameter, Policy], dict[str, Tensor]]  # the policy's state of a parameter, made if missing
    own_residue: Callable[[Parameter, Policy], Tensor]  # what rounding took, for bases that keep it themselves
    own_momentum: Callable[[Parameter, Policy], Tensor] | None  # with `momentum_beta`: the wrapper's own first moment
    momentum_beta: float | None
    report: Report | None  # where statistics go; None: not wanted
    own_table: object  # what `own_state` reads; another object as soon as a parameter's entries are replaced
    clock: Callable[[torch.device], Tensor | None]  # of a device, for `Draw.clock`
    recording: bool  # into a CUDA graph
    exchange: Exchange = field(default_factory=Exchange)  # what shards ask of other ranks, for all groups together
    local_scope: bool = False  # select in each shard as if it were the whole tensor

    def draw_on(self, device: torch.device) -> spec.Draw:
        """`draw` with the clock of this device."""
        clock = self.clock(device)
        return self.draw if clock is self.draw.clock else replace(self.draw, clock=clock)


@dataclass
class Job:
    """One parameter group's part of a step. `prepare` runs before the base steps, `finish` after it.

    Nothing but memory moves in `prepare`; `restore` puts the parameters back to what they were before `prepare`.
    """

    context: StepContext
    group: dict[str, Any]
    parameters: list[Parameter]
    policy: Policy
    facts: Anatomy
    saved: list[Tensor] = field(default_factory=list)

    steps_base = True  # whether the base's own step has to run for this group

    @cached_property
    def own_code(self) -> bool:
        """Whether the policy has code of its own, which may raise."""
        return has_own_code(self.policy, [parameter.tensor for parameter in self.parameters])

    def prepare(self) -> None: ...

    def finish(self) -> None: ...

    def restore(self) -> None:
        for parameter, saved in zip(self.parameters, self.saved, strict=False):
            parameter.tensor.copy_(saved)


class DenseJob(Job):
    """A group that is handed to the base as it is. Keeps a copy only when somebody else's code runs in the step."""

    keep_copy = False

    def prepare(self) -> None:
        if self.keep_copy:
            self.saved = copies([parameter.tensor for parameter in self.parameters])


def sign_of(base: Optimizer, group: dict[str, Any]) -> float:
    """-1 where the base maximizes: its gradient is the negative of `p.grad`. Some keep the flag on themselves."""
    return -1.0 if group.get("maximize", getattr(base, "maximize", False)) else 1.0


def sign_of_rate(group: dict[str, Any]) -> spec.Scalar:
    """Whose sign is that of the group's learning rate; 1.0 where it has none. A rate on a GPU is not waited for."""
    rate = plain_number(1.0 if group.get("lr") is None else group["lr"])
    return rate if isinstance(rate, Tensor) else -1.0 if rate < 0 else 1.0


def lookahead(base: Optimizer, group: dict[str, Any]) -> float:
    """w such that the momentum one step ahead is (1 - w) g + w m, up to a positive factor.

    It is the coefficient of the base's first moment, by its usual names (0.9 where it has none of them); for torch's
    SGD, whose m <- mu m + g is a sum and not a mean, g + mu m has w = mu / (1 + mu).
    """
    if "betas" in group:  # Lion's first one is of the update, its momentum moves with the second
        return float(group["betas"][1 if type(base).__name__ == "Lion" else 0])
    momentum = float(group.get("momentum", group.get("beta", 0.9)) or 0.0)
    return momentum / (1.0 + momentum) if isinstance(base, torch.optim.SGD) else momentum


def scalar(value: Any) -> float:
    """A hyper-parameter as a Python number (torch allows `lr` to be a tensor)."""
    return float(value.item()) if isinstance(value, torch.Tensor) else float(value)


def plain_number(value: Any) -> spec.Scalar:
    """A hyper-parameter as a Python number; a tensor on another device stays one: reading it would wait for that."""
    return value if isinstance(value, torch.Tensor) and value.device.type != "cpu" else scalar(value)
