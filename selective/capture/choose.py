"""The choice of a capture for each parameter group, with the reason."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import is_
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.base_facts import BaseFacts, base_facts
from selective.base.fused_rules import FusedMuon, FusedRule, fused_rule
from selective.base.step_base import replaced_step
from selective.capture.delta import LOW_PRECISION, DeltaJob
from selective.capture.fused import FusedJob
from selective.capture.items import KeptItems
from selective.capture.job import DenseJob, Job, StepContext
from selective.capture.muon import MuonJob
from selective.capture.rotated import RotatedJob
from selective.capture.rotated_fused import RotatedFusedJob
from selective.capture.rotated_planned import KeptStep
from selective.capture.rotated_stepped import RotatedDeltaJob, RotatedScratchJob
from selective.capture.scratch import ScratchJob
from selective.parameter import Parameter
from selective.policies import Decay, Dense, Policy
from selective.rotation.rotation import Rotation

CaptureName = Literal["auto", "fused", "scratch", "delta"]
# of parameters: dtype, device type, number of dimensions, and False for a subclass such as DTensor
ParamKinds = frozenset[tuple[torch.dtype, str, int, bool]]


@dataclass(frozen=True)
class Capture:
    """The capture of one group: the way in which its update is obtained, the reason in words, and the base's facts."""

    way: Literal["dense", "fused", "scratch", "delta"]
    reason: str
    facts: BaseFacts
    rule: FusedRule | None = None
    of_dense: bool = False  # True: our rule steps a group without a mask, because that was asked for

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
        if isinstance(self.rule, FusedMuon):
            return MuonJob(context, group, parameters, policy, self.facts, fused_rule=self.rule, **options)
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
    rotates: bool = False,
) -> Capture:
    """Choose the capture of one group, or of its rotated parameters.

    `needs_update`: the update is needed with any policy, so that `Dense()` is no exception: of rotated parameters, and
    where decay is selective. `rotates`: the group has a preconditioner.

    Raises:
        ValueError: the base cannot be wrapped, or not in the `wanted` way. The message has the reason.
    """
    name = type(base).__name__
    facts = base_facts(base, group)
    if facts.refusal is not None:
        raise ValueError(f"SelectiveUpdate: {name} can't be wrapped: {facts.refusal}")
    if group.get("differentiable"):
        raise ValueError(f"SelectiveUpdate: {name} has differentiable=True; a step with a mask is not differentiable")
    rule, why_not_fused = _fused(base, group, own_momentum, rotates)
    if isinstance(policy, Dense) and not needs_update:
        if wanted == "fused" and rule is not None and rule.steps_dense:
            reason = f"asked for: the rule of {name} {rule.manner}, where the policy is Dense(), too"
            return Capture("fused", reason, facts, rule, of_dense=True)
        return Capture("dense", "the policy is Dense(): the step is handed to the base", facts)
    if wanted == "fused" and rule is None:
        raise ValueError(f"SelectiveUpdate: capture='fused' is not possible for {name}: {why_not_fused}")
    if rule is not None and wanted in ("auto", "fused"):
        return Capture("fused", f"the rule of {name} is known and {rule.manner}", facts, rule)
    why_delta = _why_delta(group, facts)
    if wanted == "scratch" and why_delta is not None:
        raise ValueError(f"SelectiveUpdate: capture='scratch' is not right for {name}: {why_delta}")
    if wanted == "delta" or why_delta is not None:
        return Capture("delta", why_delta or "asked for", facts)
    return Capture("scratch", f"{why_not_fused}; its update does not look at the parameter", facts)


def _fused(base: Optimizer, group: dict[str, Any], own_momentum: bool, rotates: bool) -> tuple[FusedRule | None, str]:
    """Return the fused rule for this group, or None and the reason why there is none."""
    rule = fused_rule(base)
    if rule is None:
        return None, f"there is no fused rule for {type(base).__name__}"
    if replaced_step(base) is not None:
        return None, "its step() was replaced on the instance"
    if own_momentum:
        return None, "momentum_beta is given, so the wrapper keeps the momentum"
    if rotates and not rule.rotates:
        return None, "the group has a preconditioner, and the fused rule takes no rotated gradients"
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


class GroupFlags:
    """The options of a base's group that a capture is chosen by; looked through again only if one was replaced.

    A number counts only as zero or not, and several numbers do not count: some optimizers count steps in the group,
    schedulers write betas, momentum and decay in every step.
    """

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._values: list[Any] = []
        self._skipped: list[int] = []
        self._flags: tuple[object, ...] = ()
        self._named: tuple[object, ...] = ()  # `_flags` with the names

    def are_of(self, group: dict[str, Any]) -> bool:
        """True if these are the flags of this group: it has the same keys, and no flag has changed."""
        return list(group) == self._keys and self._are_of_values(self._values_of(group))

    def _values_of(self, group: dict[str, Any]) -> list[Any]:
        """The values that may be flags, and None in the place of others. The group has the keys that are known."""
        values = list(group.values())
        for place in self._skipped:
            values[place] = None
        return values

    def _are_of_values(self, values: list[Any]) -> bool:
        if all(map(is_, values, self._values)):
            return True
        same = tuple(map(_flag, values)) == self._flags
        if same:
            self._values = values
        return same

    def of(self, group: dict[str, Any]) -> tuple[object, ...]:
        """Return the names and the values of this group's flags: the same object while they are equal."""
        keys = list(group)
        if keys != self._keys:
            self._keys, self._flags = keys, ()
            self._skipped = [place for place, key in enumerate(keys) if key in _NO_FLAGS]
            self._values = [_NEVER] * len(keys)
        values = self._values_of(group)
        if not self._are_of_values(values):
            self._values, self._flags = values, tuple(map(_flag, values))
            self._named = (tuple(keys), *self._flags)
        return self._named


def _flag(value: object) -> object:
    if isinstance(value, (bool, str)):
        return value
    return value != 0 if isinstance(value, (int, float)) else None


_NEVER = object()
_NO_FLAGS = frozenset(("params", "lr", "step", "initial_lr", "param_names"))


def capture_key(
    of_base: tuple[object, ...],
    flags: tuple[object, ...],
    param_kinds: ParamKinds,
    classes: tuple[type, ...],
    needs: frozenset[str],
    decay: Decay | None = None,
    rotates: bool = False,
) -> tuple[object, ...]:
    """Return everything that the choice of a capture depends on; the last entry is `classes`.

    While the key is the same, the choice is not made again. `of_base` is `base_key`, `flags` and `param_kinds` are the
    group's; `classes` are the policy's `state_classes`, and `needs` is what it reads: the caller has them at hand.
    `decay` is the group's, and `rotates` says that it has a preconditioner.
    """
    decays = None if decay is None else (type(decay), decay.weight_decay is None)
    return of_base, flags, param_kinds, needs, decays, rotates, classes


def base_key(base: Optimizer) -> tuple[object, ...]:
    """Return what of a base itself the choice of a capture depends on."""
    return type(base), replaced_step(base) is not None
