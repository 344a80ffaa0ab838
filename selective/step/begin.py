"""A step of one optimizer, in the phases in which several optimizers can take it together.

The numbers are those of the docstring of `SelectiveUpdate.step`. The phases are: `begin_step` (the end of 1, and 2),
then either `initialise` or `take_steps` (3 to 8), unless `has_nonfinite` says that the step is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from selective.base.step_base import base_hooks, run_step_on
from selective.capture.job import Job
from selective.capture.kernel_calls import KernelCalls
from selective.kernels import Exchange
from selective.messages.said_by import said_by
from selective.parameter import Parameter
from selective.plan.advice import warn_of_rotations
from selective.plan.groups import Groups
from selective.state.check_before_step import check_state
from selective.state.store import follow_changes
from selective.statistics import StepStatistics
from selective.step.gradients import check_gradients, has_nonfinite
from selective.step.norms import NormsInStep
from selective.step.run import Part, StepRunner, fit_base_states, run_jobs
from selective.step_count import check_recordable, is_recording


@dataclass
class BegunStep:
    """A step of one optimizer, whose gradients were checked. Nothing has moved yet."""

    runner: StepRunner
    groups: Groups
    present: list[list[Parameter]]  # the parameters that have a gradient, by group
    recording: bool  # True if the step goes into a CUDA graph
    report: StepStatistics | None = None
    clocked: set[torch.device] = field(default_factory=set)
    said_by: str | None = None  # with which its errors begin; None: with "SelectiveUpdate"

    def initialise(self) -> None:
        """Make state as torch.distributed.checkpoint asks for it: the base steps, and nothing of ours is counted."""
        store = self.runner.store
        with base_hooks(store.base):
            run_step_on(store.base, store.base.param_groups)
        store.make(self.groups.plans, lambda parameter: parameter.tensor.grad is not None)

    def has_nonfinite(self) -> bool:
        """True if a gradient is not finite and `on_nonfinite` is "skip"; a FloatingPointError if it is "raise"."""
        with said_by(self.said_by):
            return has_nonfinite(self.present, self.runner.options.on_nonfinite, self.runner.count.steps)

    def skip(self) -> None:
        """Count the step as skipped."""
        self.runner.count.skipped += 1

    def check(self) -> None:
        """The rest of step 2: does the state fit its parameters?"""
        if not self.recording:
            with said_by(self.said_by):
                check_state(self.groups.plans, self.runner.store)

    def make_jobs(self, exchange: Exchange | None, calls: KernelCalls | None) -> list[Job]:
        """Return the jobs of steps 3 to 7. `exchange` and `calls` are those that several optimizers share."""
        with said_by(self.said_by):
            return self._make_jobs(exchange, calls)

    def _make_jobs(self, exchange: Exchange | None, calls: KernelCalls | None) -> list[Job]:
        runner = self.runner
        if not self.recording:
            fit_base_states(runner.store.base, self.groups.plans)
        self.report = StepStatistics() if runner.options.statistics else None
        self.clocked = self.groups.clocked()
        runner.count.start(self.clocked, self.recording)
        runner.store.make_present(self.groups.plans, self.present)
        return runner.jobs(self.groups, self.present, self.report, self.recording, exchange, calls)

    def finish(self) -> None:
        """Step 8: count the step, and hand out its statistics."""
        self.runner.count.tick(self.clocked, self.recording)
        self.runner.report = self.report


def run_closure(closure: Callable[[], Any] | None) -> Any:
    """Run the closure, if any, with gradients enabled, and return what it returns: the beginning of step 1."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def begin_step(runner: StepRunner, groups: Groups, who: str | None = None) -> BegunStep:
    """Follow what was changed since the last step, and check the gradients: the end of step 1, and step 2.

    Errors begin with `who`; None: with "SelectiveUpdate".
    """
    with said_by(who):
        return _begin_step(runner, groups, who)


def _begin_step(runner: StepRunner, groups: Groups, who: str | None) -> BegunStep:
    rotations = [plan.rotation for plan in groups.plans]
    follow_changes(groups, runner.store)
    changed = [plan for plan, before in zip(groups.plans, rotations, strict=False) if plan.rotation is not before]
    if changed:  # a limit was set, or a parameter has its shape only now: construction could not warn
        warn_of_rotations(changed)
    present = [plan.params.with_gradient() for plan in groups.plans]
    check_gradients(groups.plans, present)
    return BegunStep(runner, groups, present, _is_recorded(runner, groups), said_by=who)


def take_steps(begun: Sequence[BegunStep], exchange: Exchange | None = None) -> None:
    """Take the steps of these optimizers together, from the check of their state to their statistics.

    `exchange` is the one that they share.
    """
    calls = KernelCalls()
    for step in begun:
        step.check()
    parts = [Part(step.runner, step.make_jobs(exchange, calls), step.said_by) for step in begun]
    run_jobs(parts, calls, NormsInStep([(step.runner, step.groups.plans, step.present) for step in begun]))
    for step in begun:
        step.finish()


def _is_recorded(runner: StepRunner, groups: Groups) -> bool:
    """True if this step goes into a CUDA graph; an error if its replays would not be steps."""
    if not any(plan.params.cuda_devices for plan in groups.plans) or not is_recording():
        return False
    base, options = runner.store.base, runner.options
    draws = any(plan.decay is not None and plan.decay.at_random for plan in groups.plans)
    check_recordable(base, base.param_groups, options.on_nonfinite, bool(groups.places), groups.asks_others(), draws)
    return True
