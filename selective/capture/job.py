"""What the captures share: the context of a step, one group's job in it, and running the base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.base_facts import BaseFacts
from selective.foreach import copies
from selective.kernels import Exchange, spec
from selective.parameter import Parameter
from selective.policies import Policy
from selective.policies.kernel_terms import has_own_code
from selective.statistics import Report


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
    facts: BaseFacts
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
