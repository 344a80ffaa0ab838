"""The choice of a capture for each parameter group, with the reason."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.base_facts import BaseFacts, base_facts
from selective.base.fused_rules import FusedRule, fused_rule
from selective.base.step_base import replaced_step
from selective.capture.delta import LOW_PRECISION, DeltaJob
from selective.capture.fused import FusedJob
from selective.capture.items import KeptItems
from selective.capture.job import DenseJob, Job, StepContext
from selective.capture.rotated import RotatedJob
from selective.capture.rotated_fused import RotatedFusedJob
from selective.capture.rotated_planned import KeptStep
from selective.capture.rotated_stepped import RotatedDeltaJob, RotatedScratchJob
from selective.capture.scratch import ScratchJob
from selective.parameter import Parameter
from selective.policies import Decay, Dense, Policy
from selective.rotation.rotation import Rotation

CaptureName = Literal["auto", "fused", "scratch", "delta"]
ParamKinds = frozenset[tuple[torch.dtype, str, int]]  # of parameters: dtype, device type, number of dimensions


@dataclass(frozen=True)
class Capture:
    """The capture of one group: the way in which its update is obtained, the reason in words, and the base's facts."""

    way: Literal["dense", "fused", "scratch", "delta"]
    reason: str
    facts: BaseFacts
    rule: FusedRule | None = None

    def job(
        self,
        context: StepContext,
        group: dict[str, Any],
        parameters: list[Parameter],
        policy: Policy,
        kept_items: KeptItems,
        decay: Decay | None = None,
    ) -> Job:
        """Make the job of this group in one step."""
        if self.way == "dense":
            return DenseJob(context, group, parameters, policy, self.facts)
        if isinstance(policy, Dense):
            context = _without_mask(context)
        options: Any = {"kept_items": kept_items, "decay": decay}
        if self.way == "fused":
            assert self.rule is not None
            return FusedJob(context, group, parameters, policy, self.facts, fused_rule=self.rule, **options)
        cls = ScratchJob if self.way == "scratch" else DeltaJob
        return cls(context, group, parameters, policy, self.facts, **options)

    def rotated_job(
        self,
        unrotated_job: Job,
        parameters: list[Parameter],
        rotation: Rotation,
        kept_items: KeptItems,
        kept_step: KeptStep,
        all_rotated: bool,
    ) -> RotatedJob:
        """Make the job of a group's rotated parameters.

        `unrotated_job` is the job of the group's other parameters. `all_rotated` is True if there are none, so that it
        has nothing to do.
        """
        context, policy = unrotated_job.context, unrotated_job.policy
        if isinstance(policy, Dense):
            context = _without_mask(context)
        options: Any = {"rotation": rotation, "kept_items": kept_items, "decay": unrotated_job.decay}
        if self.way == "fused":
            options |= {
                "fused_rule": self.rule,
                "kept_step": kept_step,
                "hides_gradients": isinstance(unrotated_job, DenseJob) and not all_rotated,
                "all_rotated": all_rotated,
            }
        cls = {"fused": RotatedFusedJob, "scratch": RotatedScratchJob, "delta": RotatedDeltaJob}[self.way]
        return cls(context, unrotated_job.group, parameters, policy, self.facts, **options)

    def keeps_residue(self, param: Tensor) -> bool:
        """True if we keep the rounding residue of this parameter, as the base would have done without us."""
        return self.way == "delta" and bool(self.facts.residue) and param.dtype in LOW_PRECISION

    def has_momentum(self, group: dict[str, Any]) -> bool:
        """True if the base has a first moment of the gradient."""
        if self.rule is not None:
            return self.rule.has_momentum(group)
        return self.facts.momentum_key is not None


def _without_mask(context: StepContext) -> StepContext:
    """The context of a dense group: it has no statistics where the base steps alone, and reads no momentum of ours."""
    return replace(context, report=None, own_momentum=None, momentum_beta=None)


def choose_capture(
    base: Optimizer,
    group: dict[str, Any],
    policy: Policy,
    wanted: CaptureName,
    own_momentum: bool,
    needs_update: bool = False,
) -> Capture:
    """Choose the capture of one group, or of its rotated parameters.

    `needs_update`: the update is needed with any policy, so that `Dense()` is no exception: of rotated parameters, and
    where decay is selective.

    Raises:
        ValueError: the base cannot be wrapped, or not in the `wanted` way. The message has the reason.
    """
    name = type(base).__name__
    facts = base_facts(base, group)
    if facts.refusal is not None:
        raise ValueError(f"SelectiveUpdate: {name} can't be wrapped: {facts.refusal}")
    if group.get("differentiable"):
        raise ValueError(f"SelectiveUpdate: {name} has differentiable=True; a step with a mask is not differentiable")
    if isinstance(policy, Dense) and not needs_update:
        return Capture("dense", "the policy is Dense(): the step is handed to the base", facts)
    rule, why_not_fused = _fused(base, group, own_momentum)
    if wanted == "fused" and rule is None:
        raise ValueError(f"SelectiveUpdate: capture='fused' is not possible for {name}: {why_not_fused}")
    if rule is not None and wanted in ("auto", "fused"):
        return Capture("fused", f"the rule of {name} is known and runs on the base's own state", facts, rule)
    why_delta = _why_delta(group, facts)
    if wanted == "scratch" and why_delta is not None:
        raise ValueError(f"SelectiveUpdate: capture='scratch' is not right for {name}: {why_delta}")
    if wanted == "delta" or why_delta is not None:
        return Capture("delta", why_delta or "asked for", facts)
    return Capture("scratch", f"{why_not_fused}; its update does not look at the parameter", facts)


def _fused(base: Optimizer, group: dict[str, Any], own_momentum: bool) -> tuple[FusedRule | None, str]:
    """Return the fused rule for this group, or None and the reason why there is none."""
    rule = fused_rule(base)
    if rule is None:
        return None, f"there is no fused rule for {type(base).__name__}"
    if replaced_step(base) is not None:
        return None, "its step() was replaced on the instance"
    if own_momentum:
        return None, "momentum_beta is given, so the wrapper keeps the momentum"
    unsupported = rule.supports(group)
    if unsupported is not None:
        return None, f"the fused rule does not cover {unsupported}"
    return rule, ""


def _why_delta(group: dict[str, Any], facts: BaseFacts) -> str | None:
    """Return the reason why scratch capture would be wrong and delta capture is needed; None if scratch is right."""
    if facts.depends_on_param:
        return "its update looks at the parameter's value"
    if facts.decay == "inside":
        return "its weight decay is part of the update"
    if facts.residue:
        return f"it keeps the parameter's rounding residue in {', '.join(facts.residue)}"
    return None


def capture_key(
    base: Optimizer,
    group: dict[str, Any],
    param_kinds: ParamKinds,
    classes: tuple[type, ...],
    needs: frozenset[str],
    decay: Decay | None = None,
) -> tuple[object, ...]:
    """Return everything that the choice of a capture depends on; the last entry is `classes`.

    While the key is the same, the choice is not made again. `param_kinds` is the group's; `classes` are the policy's
    `state_classes`, and `needs` is what it reads: the caller has them at hand. `decay` is the group's.
    """
    decays = None if decay is None else (type(decay), decay.weight_decay is None)
    skip = ("params", "lr", "step", "initial_lr", "param_names")
    # A number counts only as zero or not: some optimizers count steps in the group, schedulers change betas and decay.
    flags = tuple(
        (k, v if isinstance(v, (bool, str)) else v != 0)
        for k, v in group.items()
        if k not in skip and isinstance(v, (bool, str, int, float))
    )
    return type(base), replaced_step(base) is not None, flags, param_kinds, needs, decays, classes
