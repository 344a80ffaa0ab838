"""Which parameters, policy and capture every group has: kept from step to step, and in step with the base's groups."""

from __future__ import annotations

from typing import Any

import torch

from selective.capture.choose import CaptureName, capture_key, choose_capture
from selective.plan.flattened import refuse_joined
from selective.plan.group_params import GroupParams
from selective.plan.group_plan import Choice, GroupPlan
from selective.plan.policy_groups import KEYS, PolicyGroup, PreconditionerGroup, take_policy, take_preconditioner
from selective.plan.refusals import check_complete, check_flattened, check_momentum, check_shards
from selective.plan.rotation_plan import RotationPlan, check_change
from selective.plan.shared_parameters import check_sharing
from selective.policies import Policy
from selective.rotation.moments import check_moments, moments_of
from selective.state.live import Live
from selective.state.store import OwnState
from selective.step_count import Clocks


class Planning(OwnState):
    """The part of `SelectiveUpdate` that notices what was changed in the base's groups and in the policies."""

    _default: Policy
    _default_preconditioning: PreconditionerGroup
    _wanted: CaptureName
    _recorded: Live[list[Any]] = Live()
    _choices: Live[dict[int, Choice]] = Live()  # of a copy: those of the original, by the number of the group
    _edited: Live[bool] = Live()

    def _start_planning(self) -> None:
        """What no copy and no pickle has: it is made anew from groups and state, and holds tables on the device."""
        known = self._live.get("_plans", [])
        self._choices = {**self._choices, **{plan.number: plan.choice for plan in known}}
        self._plans, self._places = [], {}
        self._edited = False  # whether parameters have left a group, and may have left all
        self._recorded = []  # items in CUDA graphs of groups that were edited since: graphs read their tables
        self._clocks = Clocks()

    def _look(self) -> list[GroupPlan]:
        """The plans, with the parameters that the groups have now. Groups that were not taken in yet have none."""
        address = 0
        for number, (group, policy_group) in enumerate(zip(self.param_groups, self.policy_groups, strict=False)):
            if number == len(self._plans):
                params, choice = GroupParams(group, number, address), self._choices.pop(number, None)
                self._plans.append(GroupPlan(number, group, policy_group, params, choice))
            plan = self._plans[number]
            plan.group, plan.policy_group = group, policy_group
            if not plan.params.are_of(group, address):
                self._set_aside(plan)
                plan.replace_params(GroupParams(group, number, address, plan.params))
            address += len(group["params"])
        for removed in self._plans[len(self.param_groups) :]:
            self._set_aside(removed)
        del self._plans[len(self.param_groups) :]
        return self._plans

    def _set_aside(self, plan: GroupPlan) -> None:
        self._recorded += plan.kept.recorded
        self._edited = True

    def _forget_those_gone(self) -> None:
        """Keep nothing of parameters that are in no group, and of which the base has nothing either."""
        if not self._edited:
            return
        there = {p for plan in self._plans for p in plan.params.tensors}
        self._own = {p: own for p, own in self._own.items() if p in there or p in self.base.state}
        self._places = {p: place for p, place in self._places.items() if p in there}
        for plan in self._plans:
            if plan.rotation is not None:
                plan.rotation.forget_all_but(there)
        self._edited = False

    def _clocked(self) -> set[torch.device]:
        """The GPUs on which something is masked, whose steps are counted there: Note [the clock]."""
        masked = (plan for plan in self._plans if plan.rotation is not None or not plan.is_dense)
        return {device for plan in masked for device in plan.params.cuda_devices}

    def _plan(self) -> None:
        """Keep parameters, policies and captures in step with the base's groups, which may have changed under us."""
        self._take_policies()
        plans = self._look()
        choices = [self._choose(plan) for plan in plans]
        switched = []
        for plan, choice in zip(plans, choices, strict=True):
            if choice is plan.choice:
                continue
            if plan.choice is not None and plan.choice.key[-1] != choice.key[-1]:
                switched.append(plan)
            plan.choice = choice
            plan.params.fits = plan.params.settled = False
        self._plan_rotations()
        self._check_sharing()
        self._forget_those_gone()
        for plan in switched:
            plan.forget_items()
            self._renew_own_state(plan)

    def _choose(self, plan: GroupPlan) -> Choice:
        """The capture of a group: the one that it has, while nothing changes that the choice depends on."""
        number, params = plan.number, plan.params
        if not isinstance(plan.policy_group, PolicyGroup):
            raise TypeError(
                f"SelectiveUpdate: policy_groups[{number}] is {plan.policy_group!r}; its entries stay, set "
                f"opt.policy_groups[{number}].policy to a Policy instead"
            )
        plan.policy_group.listen(plan.kept.policy_changed)
        policy = plan.policy
        params.look()
        if not plan.is_dense or plan.preconditioning.preconditioner is not None:
            check_flattened(params.parameters)
            if params.joined:
                refuse_joined(number, params.shapes, params.tensors)
        key = capture_key(self.base, plan.group, params.layout, policy, plan.kept.describe(policy).needs)
        if plan.choice is not None and plan.choice.key == key:
            return plan.choice
        own = self._momentum_beta is not None
        check_complete(policy, number)
        capture = choose_capture(self.base, plan.group, policy, self._wanted, own)
        check_momentum(self.base, plan.group, number, policy, capture, own)
        if not plan.is_dense:
            check_shards(params.parameters)
        return Choice(key, capture)

    def _check_sharing(self) -> None:
        """Refuse parameters that are there twice. Looked at anew where one was exchanged, or has other memory."""
        if not any(plan.params.moved for plan in self._plans):
            return
        everything = [(parameter, plan) for plan in self._plans for parameter in plan.params.parameters]
        ours = [plan.masks_or_rotates(parameter) for parameter, plan in everything]
        check_sharing([parameter for parameter, _ in everything], ours)
        for plan in self._plans:
            plan.params.moved = False

    def _plan_rotations(self) -> None:
        """What is rotated, of every group. Looked at anew where a preconditioner, a capture or a parameter changed."""
        rotations = [self._rotation_of(plan) for plan in self._plans]
        if rotations != [plan.rotation for plan in self._plans]:
            tensors = [p for rotation in rotations if rotation is not None for p in rotation.shapes]
            self._places = {p: place for place, p in enumerate(tensors)}
        for plan, rotation in zip(self._plans, rotations, strict=True):
            plan.rotation = rotation

    def _rotation_of(self, plan: GroupPlan) -> RotationPlan | None:
        preconditioning = plan.preconditioning
        known: RotationPlan | None = preconditioning.planned if preconditioning.was_planned else None
        rotation = known
        if known is None or not known.is_of(preconditioning, plan.capture, plan.params.parameters):
            rotation = None if preconditioning.preconditioner is None else self._make_rotation(plan)
            plan.params.settled = plan.params.settled and rotation is known
            if preconditioning.was_planned and (known is None or self._has_bases(known)):
                check_change(known, rotation, plan.number)
        preconditioning.planned = rotation
        return rotation

    def _make_rotation(self, plan: GroupPlan) -> RotationPlan:
        preconditioner, capture = plan.preconditioning.preconditioner, plan.capture
        assert preconditioner is not None
        if plan.is_dense:  # nobody reads a momentum of ours
            capture = choose_capture(self.base, plan.group, plan.policy, self._wanted, False, rotated=True)
        view, parameters = plan.preconditioning.matrix_view, plan.params.parameters
        rotation = RotationPlan(preconditioner, view, capture, plan.capture, parameters)
        if rotation.shapes:
            moments = moments_of(self.base, plan.group, capture.facts)
            check_moments(self.base, plan.group, plan.number, moments, preconditioner)
        return rotation

    def _take_policies(self) -> None:
        """One policy for each group: those of new groups are moved out of them."""
        groups, known = self.param_groups, self.base.defaults
        for number, group in enumerate(groups[: len(self.policy_groups)]):
            late = next((key for key in KEYS if key in group and (key == "policy" or key not in known)), None)
            if late is not None:  # it would be without effect, and the group could not be saved
                way = f"opt.preconditioner_groups[{number}]'s"
                if late == "policy":
                    way = f"opt.policy_groups[{number}].policy (a Policy) or its"
                raise ValueError(
                    f"SelectiveUpdate: param_groups[{number}] got a {late!r} after it was taken in; remove it there, "
                    f"and set {way} hyper-parameters by name"
                )
        for group in groups[len(self.policy_groups) :]:  # at construction, or added on the base itself
            self.policy_groups.append(self._taken(group))
        if len(self.policy_groups) > len(groups):
            raise RuntimeError(
                f"SelectiveUpdate: the base has {len(groups)} parameter groups, policy_groups has "
                f"{len(self.policy_groups)}: a group was removed; delete the same index from opt.policy_groups"
            )

    def _taken(self, group: dict[str, Any]) -> PolicyGroup:
        """What a group says to the wrapper, moved out of it."""
        known = self.base.defaults
        policy = take_policy(group, self._default, known)
        return PolicyGroup(policy, take_preconditioner(group, self._default_preconditioning, known))
