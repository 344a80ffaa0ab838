"""Steps 3 to 7, and the preconditioner's part of step 8: the jobs of all groups, and the errors that they raise.

The numbers are those of the docstring of `SelectiveUpdate.step`. A job is one group's part of it (`capture/job.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.fused_rules import fused_rule
from selective.base.hyperparameters import LOW_PRECISION
from selective.base.state_dtypes import fit_states
from selective.base.step_base import base_hooks, replaced_step, run_step_on
from selective.capture.decay import bases_without_decay
from selective.capture.job import DenseJob, Job, StepContext
from selective.capture.kernel_calls import KernelCalls
from selective.capture.own_code import PolicyError
from selective.capture.rotated import RotatedJob
from selective.kernels import Exchange, KernelDifference, spec
from selective.messages.said_by import said_by
from selective.parameter import Parameter
from selective.plan.group_plan import GroupPlan
from selective.plan.groups import Groups
from selective.plan.options import Options
from selective.plan.rotation_plan import RotationPlan
from selective.rotation.basis import PreconditionerError
from selective.rotation.rotation import Rotation
from selective.state.entries import MOMENTUM, RESIDUE
from selective.state.kept_bases import bases_of
from selective.state.parameter_state import OwnEntries
from selective.state.store import StateStore
from selective.statistics import StepStatistics
from selective.step.norms import NormsInStep
from selective.step_count import StepCount


class StepRunner:
    """Makes the jobs of a step and runs them. `report` is the last step's; None if there is none."""

    def __init__(self, options: Options, count: StepCount, store: StateStore) -> None:
        self.options, self.count, self.store = options, count, store
        self.report: StepStatistics | None = None

    def jobs(
        self,
        groups: Groups,
        present: Sequence[list[Parameter]],
        report: StepStatistics | None,
        recording: bool,
        exchange: Exchange | None = None,
        calls: KernelCalls | None = None,
    ) -> list[Job]:
        """The jobs of all groups. `present` are the parameters that have a gradient, by group.

        `exchange` and `calls` are those of a step that several optimizers take together.
        """
        context = self._context(groups.plans, report, recording)
        context.calls = calls
        context.exchange = context.exchange if exchange is None else exchange
        contexts: dict[torch.device | None, StepContext] = {}
        for device in self.count.clocks.devices():
            contexts[device] = context.on(device)
        jobs = []
        for plan, parameters in zip(groups.plans, present, strict=True):
            context_here, rotation_plan = contexts.get(plan.params.device, context), plan.rotation
            unrotated, rotated = (parameters, []) if rotation_plan is None else rotation_plan.split(parameters)
            policy, decay, *_ = plan.policy_group.settings()
            job = plan.capture.job(context_here, plan.group, unrotated, policy, plan.kept, decay)
            if rotation_plan is None or not rotated:
                jobs.append(job)
                continue
            # Nothing is left for the base in a dense group that is rotated as a whole, by a rule of ours.
            all_rotated = not unrotated and isinstance(job, DenseJob) and rotation_plan.capture.way == "fused"
            jobs += [] if all_rotated else [job]
            rotation = self._rotation(groups, plan, rotation_plan, rotated, context_here.report)
            capture, kept = rotation_plan.capture, (plan.kept_rotated, plan.kept_step)
            jobs.append(capture.rotated_job(job, rotated, rotation, *kept, all_rotated))
        return jobs

    def _context(self, plans: Sequence[GroupPlan], report: StepStatistics | None, recording: bool) -> StepContext:
        """The context that all jobs of a step share."""
        store, options, clocks = self.store, self.options, self.count.clocks

        def entries(parameter: Parameter) -> OwnEntries:
            return store.get_or_make(plans[parameter.group], parameter)

        momentum = (lambda parameter: entries(parameter)[MOMENTUM]) if options.keeps_momentum else None
        return StepContext(
            base=store.base, draw=spec.Draw(self.count.seed, self.count.steps, options.rounding),
            own_state=lambda parameter: store.policy_state(plans[parameter.group], parameter),
            own_residue=lambda parameter: entries(parameter)[RESIDUE],
            own_momentum=momentum, momentum_beta=options.momentum_beta, report=report,
            own_table=store.table, clock=clocks.on, recording=recording, local_scope=options.scope == "local",
            graphs=options.graph == "auto",
        )  # fmt: skip

    def _rotation(
        self,
        groups: Groups,
        plan: GroupPlan,
        rotation_plan: RotationPlan,
        rotated: list[Parameter],
        report: StepStatistics | None,
    ) -> Rotation:
        """The rotation of these parameters of one group."""
        places, count = groups.turns(rotation_plan.preconditioner)
        bases, stacks = bases_of(plan, rotated, self.store, places)
        rotation = Rotation(
            rotation_plan.preconditioner, bases, count, self.options.mask_space, stacks, rotation_plan.full_steps
        )
        if report is not None:
            reported = rotation
            if stacks is not None:
                reported = Rotation(rotation.preconditioner, plan.kept_bases.counted, count, self.options.mask_space)
            report.add_bases([p.name for p in rotated], reported.report)
        return rotation

    def run(self, jobs: list[Job]) -> None:
        """Run steps 3 to 7, and the preconditioner's part of 8. If anything raises, the parameters are put back."""
        run_jobs([Part(self, jobs)])

    def explain_failure(self, error: BaseException, current: Job | None, custom: list[Job]) -> None:
        """Raise somebody else's error again, with the step and what is as it was before."""
        after = "Parameters are as they were before the step; moments have moved."
        if isinstance(error, PreconditionerError):
            if current is None:
                after = "Nothing has moved but bases that were due before this one, and moments with them."
            elif not custom:
                after = "Parameters that come before these in their group have moved, and so have moments."
            raise PreconditionerError(
                f"SelectiveUpdate: in step {self.count.steps}, {error}\n{after}"
            ) from error.__cause__
        policies = [job for job in custom if not isinstance(job, RotatedJob) or job.specs is None]
        if policies and current is not None and isinstance(error, Exception):
            raise PolicyError(
                f"SelectiveUpdate: {current.policy.code_name()} failed in step {self.count.steps}: {error}\n{after}"
            ) from error


class Part(NamedTuple):
    """One optimizer's part of a step."""

    runner: StepRunner
    jobs: list[Job]
    said_by: str | None = None  # with which its errors begin; None: with "SelectiveUpdate"


def run_jobs(parts: Sequence[Part], calls: KernelCalls | None = None, norms: NormsInStep | None = None) -> None:
    """Run the jobs of one optimizer, or of several that step together. If anything raises, all parameters are put back.

    `calls` are the kernel calls that the jobs have left to be made together. `norms` keeps norms around all of it.
    """
    jobs = [job for part in parts for job in part.jobs]
    custom = [job for job in jobs if job.own_code]
    if custom:
        for job in jobs:
            if isinstance(job, DenseJob):
                job.keep_copy = True
    untouched = not (custom or any(map(_runs_code_of_others, parts)))
    if untouched:
        for part in parts:
            token = part.runner.store.token_of_base()
            for job in part.jobs:
                job.context.base_token = token
    part_of = {id(job): part for part in parts for job in part.jobs}
    part, current = parts[0], None
    with ExitStack() as hooks:
        for each in parts:
            hooks.enter_context(base_hooks(each.runner.store.base))
        try:
            if norms is not None:
                norms.hold()
            for job in jobs:
                part = part_of[id(job)]
                job.prepare()
            if calls is not None:
                calls.check(untouched)
            for job in jobs:
                part = part_of[id(job)]
                job.before_base()
            for part in parts:
                stepping = [job for job in part.jobs if job.steps_base]
                if stepping:
                    with bases_without_decay(stepping):
                        groups = {id(job.group): job.group for job in stepping}
                        run_step_on(part.runner.store.base, list(groups.values()))
            for job in sorted(jobs, key=lambda job: not job.own_code) if custom else jobs:  # what may raise goes first
                part, current = part_of[id(job)], job
                job.after_base()
            current = None
            if calls is not None:
                calls.run()
            for exchange in {id(job.context.exchange): job.context.exchange for job in jobs}.values():
                exchange.run()
            if norms is not None:
                norms.turn()
        except BaseException as error:
            for job in jobs:
                job.restore()
            if norms is not None:
                norms.restore()
            if calls is not None:
                calls.drop()
            if isinstance(error, KernelDifference):
                every = (parameter for job in jobs for parameter in job.parameters)
                error.name = next((p.name for p in every if p.address == error.address), None)
                raise
            with said_by(part.said_by):
                part.runner.explain_failure(error, current, custom)
                raise


def _runs_code_of_others(part: Part) -> bool:
    """True if code runs in this part of a step that may change any parameter, gradient or state: a hook, or a step.

    The step of a class whose rule we know changes nothing but the groups that it is called on.
    """
    base, jobs = part.runner.store.base, part.jobs
    if base._optimizer_step_pre_hooks:
        return True
    steps = [job for job in jobs if job.steps_base]
    return bool(steps) and (fused_rule(base) is None or replaced_step(base) is not None)


def fit_base_states(base: Optimizer, plans: Sequence[GroupPlan]) -> None:
    """Bring the base's state to the precision in which the base will step: Note [whose precision]."""
    for plan in plans:
        if plan.params.dtypes_checked:
            continue
        plan.params.dtypes_checked = True
        steps: dict[Tensor, torch.dtype] = {}
        for parameter in plan.params.parameters:
            p, way = parameter.tensor, plan.capture_of(parameter).way
            if p.dtype in LOW_PRECISION and way != "fused":  # our own kernels take any
                steps[p] = torch.float32 if way == "delta" else p.dtype
        if steps and fit_states(base, plan.group, steps, plan.capture.facts.residue):
            plan.forget_items()
