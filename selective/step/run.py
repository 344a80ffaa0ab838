"""Steps 3 to 8 of a step: every group's jobs, one after the other, and what is said when something raises in them."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from selective.base.hyperparameters import LOW_PRECISION
from selective.base.state_dtypes import fit_states
from selective.base.step_base import base_hooks, run_step_on
from selective.capture.items import KeptItems
from selective.capture.job import DenseJob, Job, StepContext
from selective.capture.own_code import PolicyError
from selective.capture.rotated import RotatedJob
from selective.checkpoint.load import Checkpointing
from selective.kernels import spec
from selective.parameter import Parameter
from selective.plan.rotation_plan import RotationPlan
from selective.rotation.basis import MaskSpace, PreconditionerError
from selective.rotation.rotation import Rotation
from selective.state.live import Live
from selective.statistics import Report

Scope = Literal["global", "local"]


class Running(Checkpointing):
    """The part of `SelectiveUpdate` that runs the jobs of a step."""

    _mask_space: MaskSpace
    _stochastic_rounding: bool
    _scope: Scope = "global"
    _report: Live[Report | None] = Live()

    def _fit_states(self) -> None:
        """The base's state in the precision in which the base will step: Note [whose precision]."""
        for plan in self._plans:
            if plan.params.fits:
                continue
            plan.params.fits = True
            steps: dict[Tensor, torch.dtype] = {}
            for parameter in plan.params.parameters:
                p, way = parameter.tensor, plan.capture_of(parameter).way
                if p.dtype in LOW_PRECISION and way != "fused":  # our own kernels take any
                    steps[p] = torch.float32 if way == "delta" else p.dtype
            if steps and fit_states(self.base, plan.group, steps, plan.capture.facts.residue):
                plan.forget_items()

    def _jobs(self, present: list[list[Parameter]], report: Report | None, recording: bool) -> list[Job]:
        context = StepContext(
            base=self.base, draw=spec.Draw(self._seed, self._steps, self._stochastic_rounding),
            own_state=self._own_state, own_residue=self._own_residue,
            own_momentum=None if self._momentum_beta is None else self._own_momentum,
            momentum_beta=self._momentum_beta, report=report,
            own_table=self._own, clock=self._clocks.on, recording=recording, local_scope=self._scope == "local",
        )  # fmt: skip
        contexts: dict[torch.device | None, StepContext] = {}
        for device in self._clocks.devices():
            contexts[device] = replace(context, draw=context.draw_on(device))
        jobs = []
        for plan, parameters in zip(self._plans, present, strict=True):
            here, rotates = contexts.get(plan.params.device, context), plan.rotation
            rest, rotated = (parameters, []) if rotates is None else rotates.split(parameters)
            job = plan.capture.job(here, plan.group, rest, plan.policy, plan.kept)
            if rotates is None or not rotated:
                jobs.append(job)
                continue
            # Nothing is left for the base in a dense group that is rotated as a whole, by a rule of ours.
            alone = not rest and isinstance(job, DenseJob) and rotates.capture.way == "fused"
            jobs += [] if alone else [job]
            jobs.append(self._rotated_job(job, rotates, rotated, plan.kept_rotated, alone))
        return jobs

    def _rotated_job(
        self, beside: Job, plan: RotationPlan, rotated: list[Parameter], kept: KeptItems, alone: bool
    ) -> Job:
        bases = []
        for parameter in rotated:
            self._own_of(parameter, beside.policy)
            bases.append(self._basis(parameter))
        rotation = Rotation(plan.preconditioner, bases, len(self._places), self._mask_space)
        if beside.context.report is not None:
            beside.context.report.add_bases([p.name for p in rotated], rotation.report)
        return plan.capture.rotated_job(beside, rotated, rotation, kept, alone)

    def _run(self, jobs: list[Job]) -> None:
        """Steps 3 to 8. When anything raises, the parameters are put back."""
        custom = [job for job in jobs if job.own_code]
        for job in jobs:
            if isinstance(job, DenseJob):
                job.keep_copy = bool(custom)
        current: Job | None = None
        with base_hooks(self.base):
            try:
                for job in jobs:
                    job.prepare()
                stepping = list({id(job.group): job.group for job in jobs if job.steps_base}.values())
                if stepping:
                    run_step_on(self.base, stepping)
                for job in sorted(jobs, key=lambda job: not job.own_code):  # what may raise goes first
                    current = job
                    job.finish()
                current = None
                for exchange in {id(job.context.exchange): job.context.exchange for job in jobs}.values():
                    exchange.run()
            except BaseException as error:
                for job in jobs:
                    job.restore()
                self._explain_failure(error, current, custom)
                raise

    def _explain_failure(self, error: BaseException, current: Job | None, custom: list[Job]) -> None:
        """Raise somebody else's error again, with the step and what is as it was before."""
        after = "Parameters are as they were before the step; moments have moved."
        if isinstance(error, PreconditionerError):
            if current is None:
                after = "Nothing has moved but bases that were due before this one, and moments with them."
            elif not custom:
                after = "Parameters that come before these in their group have moved, and so have moments."
            raise PreconditionerError(f"SelectiveUpdate: in step {self._steps}, {error}\n{after}") from error.__cause__
        policies = [job for job in custom if not isinstance(job, RotatedJob) or job.specs is None]
        if policies and current is not None and isinstance(error, Exception):
            raise PolicyError(
                f"SelectiveUpdate: {type(current.policy).__name__} failed in step {self._steps}: {error}\n{after}"
            ) from error
