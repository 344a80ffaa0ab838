"""Which capture a parameter group gets, and why."""

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
from selective.capture.rotated_stepped import RotatedDeltaJob, RotatedScratchJob
from selective.capture.scratch import ScratchJob
from selective.parameter import Parameter
from selective.policies import Dense, Policy
from selective.rotation.rotation import Rotation

CaptureName = Literal["auto", "fused", "scratch", "delta"]
Layout = frozenset[tuple[torch.dtype, str, int]]  # dtype, type of device and number of dimensions of parameters


@dataclass(frozen=True)
class Capture:
    """How one group's update is obtained: the way, the reason in one sentence, and what is known of the base."""

    way: Literal["dense", "fused", "scratch", "delta"]
    reason: str
    facts: BaseFacts
    rule: FusedRule | None = None

    def job(
        self, context: StepContext, group: dict[str, Any], parameters: list[Parameter], policy: Policy, kept: KeptItems
    ) -> Job:
        """This group's part of a step."""
        if self.way == "fused":
            assert self.rule is not None
            return FusedJob(context, group, parameters, policy, self.facts, rule=self.rule, kept=kept)
        if self.way == "dense":
            return DenseJob(context, group, parameters, policy, self.facts)
        cls = ScratchJob if self.way == "scratch" else DeltaJob
        return cls(context, group, parameters, policy, self.facts, kept=kept)

    def rotated_job(
        self, beside: Job, parameters: list[Parameter], rotation: Rotation, kept: KeptItems, alone: bool
    ) -> RotatedJob:
        """The job of a group's rotated parameters, next to that of its others; `alone`: which has nothing to do."""
        context, policy = beside.context, beside.policy
        if isinstance(policy, Dense):  # it has no statistics elsewhere either, and nobody reads a momentum of ours
            context = replace(context, report=None, own_momentum=None, momentum_beta=None)
        common: Any = {"rotation": rotation, "kept": kept}
        if self.way == "fused":
            common |= {"rule": self.rule, "hides": isinstance(beside, DenseJob) and not alone, "alone": alone}
        cls = {"fused": RotatedFusedJob, "scratch": RotatedScratchJob, "delta": RotatedDeltaJob}[self.way]
        return cls(context, beside.group, parameters, policy, self.facts, **common)

    def keeps_residue(self, param: Tensor) -> bool:
        """Whether we keep what rounding takes from this parameter, as the base would without us."""
        return self.way == "delta" and bool(self.facts.residue) and param.dtype in LOW_PRECISION

    def has_momentum(self, group: dict[str, Any]) -> bool:
        """Whether the base offers a first moment of the gradient."""
        if self.rule is not None:
            return self.rule.has_momentum(group)
        return self.facts.momentum_key is not None


def choose_capture(
    base: Optimizer,
    group: dict[str, Any],
    policy: Policy,
    wanted: CaptureName,
    own_momentum: bool,
    rotated: bool = False,
) -> Capture:
    """The capture of one group; of its `rotated` parameters, whose update is needed whatever the policy.

    Raises where the base can't be wrapped, or not in the wanted way, with the reason.
    """
    name = type(base).__name__
    facts = base_facts(base, group)
    if facts.refusal is not None:
        raise ValueError(f"SelectiveUpdate: {name} can't be wrapped: {facts.refusal}")
    if group.get("differentiable"):
        raise ValueError(f"SelectiveUpdate: {name} has differentiable=True; a step with a mask is not differentiable")
    if isinstance(policy, Dense) and not rotated:
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
    if facts.depends_on_param:
        return "its update looks at the parameter's value"
    if facts.decay == "inside":
        return "its weight decay is part of the update"
    if facts.residue:
        return f"it keeps the parameter's rounding residue in {', '.join(facts.residue)}"
    return None


def capture_key(
    base: Optimizer, group: dict[str, Any], layout: Layout, policy: Policy, needs: frozenset[str]
) -> tuple[object, ...]:
    """What the choice of a capture depends on; nothing is asked again while it is the same. Last: the policy's class.

    `layout` and `needs` are the group's and the policy's, looked up by whoever keeps them.
    """
    skip = ("params", "lr", "step", "initial_lr", "param_names")
    # Of numbers only whether they are 0: some bases count their steps in the group, schedulers move betas and decay.
    flags = tuple(
        (k, v if isinstance(v, (bool, str)) else v != 0)
        for k, v in group.items()
        if k not in skip and isinstance(v, (bool, str, int, float))
    )
    return type(base), replaced_step(base) is not None, flags, layout, needs, type(policy)
