"""The record of one parameter group: what the next step does with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import is_
from typing import Any, NamedTuple

from selective.capture.choose import Capture, GroupFlags
from selective.capture.items import KeptItems
from selective.capture.rotated_planned import KeptStep
from selective.norms import Norm
from selective.parameter import Parameter
from selective.plan.group_params import GroupParams
from selective.plan.norm_plan import NormPlan
from selective.plan.policy_groups import PolicyGroup, PreconditionerGroup
from selective.plan.rotation_plan import RotationPlan
from selective.policies import Decay, Dense, Policy
from selective.preconditioner import Shape
from selective.rotation.kept_bases import KeptBases


class Choice(NamedTuple):
    """A capture, and what the choice depended on: `capture_key`, whose last part is the policy's state classes."""

    key: tuple[object, ...]
    capture: Capture


@dataclass(eq=False)
class GroupPlan:
    """One parameter group: its parameters and policy, how its updates are captured, what of it is rotated."""

    number: int  # its index in the base's groups
    group: dict[str, Any]  # the base's own
    policy_group: PolicyGroup
    params: GroupParams
    choice: Choice | None = None  # None until an update has chosen
    rotation: RotationPlan | None = None  # None where there is no preconditioner
    norms: NormPlan | None = None  # None where no norm is kept
    kept: KeptItems = field(default_factory=KeptItems)  # of the parameters that are not rotated ...
    kept_rotated: KeptItems = field(default_factory=KeptItems)  # ... and of those that are
    flags: GroupFlags = field(default_factory=GroupFlags)  # of the base's group
    kept_bases: KeptBases = field(default_factory=KeptBases)
    kept_step: KeptStep = field(default_factory=KeptStep)  # of those that are rotated together in stacks
    chosen_by: list[Any] = field(default_factory=list)  # the choice, and the objects that it was confirmed by last
    keys_checked: int = 0  # the number of the group's keys when they were last looked at ...
    keys_warned: set[str] = field(default_factory=set)  # ... and those that were warned of

    @property
    def policy(self) -> Policy:
        """The group's current policy."""
        return self.policy_group.policy

    @property
    def preconditioning(self) -> PreconditionerGroup:
        """The group's current preconditioner settings."""
        return self.policy_group.preconditioning

    @property
    def decay(self) -> Decay | None:
        """The group's current selective decay; None if decoupled decay reaches every coordinate."""
        return self.policy_group.decaying.decay

    @property
    def norm(self) -> Norm | None:
        """The group's current rule about norms; None if the base moves them."""
        return self.policy_group.norming.norm

    @property
    def steps_alone(self) -> bool:
        """True if the base steps the parameters that are not rotated by itself.

        Then there is no mask and no selective decay, and our rule was not asked for.
        """
        ours = self.choice is not None and self.choice.capture.of_dense
        return self.decay is None and self.is_dense and not ours

    @property
    def is_dense(self) -> bool:
        """True if no coordinate is masked."""
        return isinstance(self.policy_group.policy, Dense)

    @property
    def capture(self) -> Capture:
        """The capture of the parameters that are not rotated, and the reason for it."""
        assert self.choice is not None  # a plan is used after an update
        return self.choice.capture

    def capture_of(self, parameter: Parameter) -> Capture:
        """The capture of this parameter."""
        rotates = self.rotation is not None and parameter.tensor in self.rotation.shapes
        return self.rotation.capture if self.rotation is not None and rotates else self.capture

    def rotated_as(self, parameter: Parameter) -> tuple[RotationPlan, Shape] | None:
        """Return (rotation plan, matrix shape) of this parameter; None if it is not rotated."""
        shape = None if self.rotation is None else self.rotation.shapes.get(parameter.tensor)
        return None if self.rotation is None or shape is None else (self.rotation, shape)

    def masks_or_rotates(self, parameter: Parameter) -> bool:
        """True if this parameter is masked, rotated, decays selectively or keeps its norm; else the base steps it."""
        keeps_norm = self.norms is not None and parameter.tensor in self.norms.shapes
        return not self.steps_alone or keeps_norm or self.rotated_as(parameter) is not None

    def is_as_before(self, group: dict[str, Any], policy_group: PolicyGroup, address: int) -> bool:
        """True if this group has what it was planned by. What of its parameters has changed is marked."""
        params, chosen_by = self.params, self.chosen_by
        if not chosen_by or group is not self.group or policy_group is not self.policy_group:
            return False
        policy_group.listen(self.kept.policy_changed)
        policy, decay, preconditioner, view, planned = policy_group.settings()
        by_now = self.choice, policy, decay, preconditioner, params, params.kinds
        if not all(map(is_, by_now, chosen_by)) or planned is not self.rotation:
            return False
        if self.rotation is not None and self.rotation.matrix_view != view:
            return False
        if self.norms is None:
            if policy_group.norming._norm is not None:
                return False
        elif policy_group.norming._norm is not self.norms.norm or self.norms.matrix_view != view:
            return False
        if params.joined or not params.are_of(group, address) or not self.flags.are_of(group):
            return False
        params.detect_changes()
        return not params.memory_changed

    def replace_params(self, params: GroupParams) -> None:
        """Replace the parameter list, and start with empty `KeptItems`."""
        self.params, self.kept, self.kept_rotated = params, KeptItems(), KeptItems()
        self.chosen_by = []  # it holds the old list
        self.forget_bases()

    def forget_items(self) -> None:
        """Drop the kernels' items; the next step rebuilds them from the state that is there then."""
        self.kept.drop()
        self.kept_rotated.drop()
        self.forget_bases()

    def forget_bases(self) -> None:
        """Drop the bases and what was made of them, so that entries which are replaced are freed."""
        self.kept_bases = KeptBases()
        self.kept_step.drop()

    def look_anew(self) -> None:
        """Drop the items and the marks, because state was replaced: the next step rebuilds and rechecks."""
        self.forget_items()
        self.params.dtypes_checked = self.params.state_checked = False
