"""The context of one step, and the job of one parameter group in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.base_facts import BaseFacts
from selective.base.fused_rules import fused_rule
from selective.base.hyperparameters import check_numbers
from selective.foreach import copies
from selective.kernels import Exchange, spec
from selective.parameter import Parameter
from selective.policies import Decay, Policy
from selective.statistics import StepStatistics


class CollectsCalls(Protocol):
    """Collects kernel calls of several jobs: `capture/kernel_calls.py`."""

    def add(self, items: Any, step_spec: spec.StepSpec, then: Callable[..., None], graphs: bool = False) -> None: ...


@dataclass
class StepContext:
    """The settings and services of one step of the wrapper, which all groups' jobs share."""

    base: Optimizer
    draw: spec.Draw
    own_state: Callable[[Parameter], dict[str, Tensor]]  # the policy's state of a parameter, made if missing
    own_residue: Callable[[Parameter], Tensor]  # our rounding residue, for base optimizers that would keep one
    own_momentum: Callable[[Parameter], Tensor] | None  # with `momentum_beta`: our own first moment
    momentum_beta: float | None
    report: StepStatistics | None  # where statistics go; None: not wanted
    own_table: object  # what `own_state` reads; another object as soon as a parameter's entries are replaced
    clock: Callable[[torch.device], Tensor | None]  # the step count on a device, for `Draw.clock`
    recording: bool  # True while a CUDA graph is recorded
    exchange: Exchange = field(default_factory=Exchange)  # the sums over ranks of all groups, made together
    calls: CollectsCalls | None = None  # kernel calls that are made together; None: each job makes its own at once
    # `StateStore.token_of_base` of this step; None if code of others may have replaced state since
    base_token: object | None = None
    local_scope: bool = False  # True: select in each shard as if it were the whole tensor
    graphs: bool = False  # True: launches of kernels may be replayed as CUDA graphs

    def draw_on(self, device: torch.device) -> spec.Draw:
        """Return `draw` with the clock of this device."""
        clock, draw = self.clock(device), self.draw
        return draw if clock is draw.clock else spec.Draw(draw.seed, draw.step, draw.stochastic, clock)

    def on(self, device: torch.device) -> StepContext:
        """Return a context like this one whose `draw` has the clock of this device."""
        here = object.__new__(StepContext)
        here.__dict__.update(self.__dict__)
        here.draw = self.draw_on(device)
        return here


@dataclass
class Job:
    """One parameter group's part of a step. `before_base` runs before the base's step, `after_base` after it.

    `prepare` runs before both, for all groups. It reads what the step needs and refuses what can't be stepped. It
    changes no parameter and no moment, but may make state that a first step lacks. `before_base` changes no parameter,
    but may exchange its memory. `restore` puts the parameters back to their values before `before_base`.
    """

    context: StepContext
    group: dict[str, Any]
    parameters: list[Parameter]
    policy: Policy
    facts: BaseFacts
    saved: list[Tensor] = field(default_factory=list)
    decay: Decay | None = None  # None: decoupled decay reaches every coordinate

    steps_base = True  # True if the base's own step has to run for this group
    own_code = False  # True if the policy runs code of its own, which may raise

    def prepare(self) -> None: ...

    def before_base(self) -> None: ...

    def after_base(self) -> None: ...

    def restore(self) -> None:
        for parameter, saved in zip(self.parameters, self.saved, strict=False):
            parameter.tensor.copy_(saved)


class DenseJob(Job):
    """The job of a group that the base steps without us."""

    keep_copy = False  # True if other groups run a policy's own code, which may raise: then there is a copy to restore

    def prepare(self) -> None:
        if fused_rule(self.context.base) is not None:
            check_numbers(self.context.base, self.group)

    def before_base(self) -> None:
        if self.keep_copy:
            self.saved = copies([parameter.tensor for parameter in self.parameters])
