"""Which parameters, policy and capture every group has: kept from step to step, and in step with the base's groups."""

from __future__ import annotations

from typing import Any

import torch

from selective.capture.choose import Capture, CaptureName, capture_key, choose_capture
from selective.parameter import Parameter
from selective.plan.flattened import refuse_joined
from selective.plan.group_params import Members
from selective.plan.policy_groups import KEYS, PolicyGroup, PreconditionerGroup, take_policy, take_preconditioner
from selective.plan.refusals import check_complete, check_flattened, check_momentum, check_shards
from selective.plan.rotated import Stage, check_change
from selective.plan.shared_parameters import check_sharing
from selective.policies import Dense, Policy
from selective.rotation.moments import check_moments, moments_of
from selective.state.live import Live
from selective.state.store import OwnState
from selective.step_count import Clocks


class Planning(OwnState):
    """The part of `SelectiveUpdate` that notices what was changed in the base's groups and in the policies."""

    _default: Policy
    _default_preconditioning: PreconditionerGroup
    _wanted: CaptureName
    _members: Live[list[Members]] = Live()
    _recorded: Live[list[Any]] = Live()
    _edited: Live[bool] = Live()

    def _start_planning(self) -> None:
        """What no copy and no pickle has: it is made anew from groups and state, and holds tables on the device."""
        self._members = []
        self._stages, self._places = [], {}
        self._edited = False  # whether parameters have left a group, and may have left all
        self._recorded = []  # items in CUDA graphs of groups that were edited since: graphs read their tables
        self._clocks = Clocks()

    def _look(self) -> list[Members]:
        """The groups' parameters with address and name."""
        address = 0
        for number, group in enumerate(self.param_groups):
            known = self._members[number] if number < len(self._members) else None
            if known is None or not known.are_of(group, address):
                if known is not None:
                    self._recorded += known.kept.recorded
                    self._edited = True
                self._members[number : number + 1] = [Members(group, number, address, known)]
            address += len(group["params"])
        for removed in self._members[len(self.param_groups) :]:
            self._recorded += removed.kept.recorded
            self._edited = True
        del self._members[len(self.param_groups) :]
        return self._members

    def _forget_those_gone(self) -> None:
        """Keep nothing of parameters that are in no group, and of which the base has nothing either."""
        if not self._edited:
            return
        there = {p for members in self._members for p in members.tensors}
        self._own = {p: own for p, own in self._own.items() if p in there or p in self.base.state}
        self._places = {p: place for p, place in self._places.items() if p in there}
        for stage in self._stages:
            if stage is not None:
                stage.forget_all_but(there)
        self._edited = False

    def _parameters(self) -> list[list[Parameter]]:
        """The parameters by group."""
        return [members.parameters for members in self._look()]

    def _clocked(self) -> set[torch.device]:
        """The GPUs on which something is masked, whose steps are counted there: Note [the clock]."""
        masked = zip(self._members, self.policy_groups, self._stages, strict=True)
        return {
            device
            for members, group, stage in masked
            if stage is not None or not isinstance(group.policy, Dense)
            for device in members.cuda_devices
        }

    def _plan(self) -> None:
        """Keep parameters, policies and captures in step with the base's groups, which may have changed under us."""
        self._take_policies()
        captures: list[tuple[tuple[object, ...], Capture]] = []
        switched: list[int] = []
        plan = zip(self.param_groups, self.policy_groups, self._look(), strict=True)
        for number, (group, policy_group, members) in enumerate(plan):
            if not isinstance(policy_group, PolicyGroup):
                raise TypeError(
                    f"SelectiveUpdate: policy_groups[{number}] is {policy_group!r}; its entries stay, set "
                    f"opt.policy_groups[{number}].policy to a Policy instead"
                )
            policy_group.listen(members.kept.policy_changed)
            policy = policy_group.policy
            members.look()
            if not isinstance(policy, Dense) or policy_group.preconditioning.preconditioner is not None:
                check_flattened(members.parameters)
                if members.joined:
                    refuse_joined(number, members.shapes, members.tensors)
            key = capture_key(self.base, group, members.layout, policy, members.kept.describe(policy).needs)
            known = self._captures[number] if number < len(self._captures) else None
            if known is not None and known[0] == key:
                captures.append(known)
                continue
            own = self._momentum_beta is not None
            check_complete(policy, number)
            capture = choose_capture(self.base, group, policy, self._wanted, own)
            check_momentum(self.base, group, number, policy, capture, own)
            if not isinstance(policy, Dense):
                check_shards(members.parameters)
            captures.append((key, capture))
            members.fits = members.settled = False
            if known is not None and known[0][-1] != key[-1]:
                switched.append(number)
        self._captures = captures
        self._plan_stages()
        self._check_sharing()
        self._forget_those_gone()
        for number in switched:
            self._members[number].kept.drop()
            self._renew_own_state(number)

    def _check_sharing(self) -> None:
        """Refuse parameters that are there twice. Looked at anew where one was exchanged, or has other memory."""
        if not any(members.moved for members in self._members):
            return
        everything = [parameter for members in self._members for parameter in members.parameters]
        policies = [group.policy for group, members in zip(self.policy_groups, self._members, strict=True)
                    for _ in members.parameters]  # fmt: skip
        ours = [
            not isinstance(policy, Dense) or self._stage_of(parameter) is not None
            for parameter, policy in zip(everything, policies, strict=True)
        ]
        check_sharing(everything, ours)
        for members in self._members:
            members.moved = False

    def _plan_stages(self) -> None:
        """What is rotated, of every group. Looked at anew where a preconditioner, a capture or a parameter changed."""
        stages: list[Stage | None] = []
        for number, (policy_group, members) in enumerate(zip(self.policy_groups, self._members, strict=True)):
            preconditioning, beside = policy_group.preconditioning, self._captures[number][1]
            known: Stage | None = preconditioning.planned if preconditioning.was_planned else None
            stage = known
            if known is None or not known.is_of(preconditioning, beside, members.parameters):
                stage = None if preconditioning.preconditioner is None else self._make_stage(number, beside)
                members.settled = members.settled and stage is known
                if preconditioning.was_planned and (known is None or self._has_bases(known)):
                    check_change(known, stage, number)
            preconditioning.planned = stage
            stages.append(stage)
        if stages != self._stages:
            tensors = [p for stage in stages if stage is not None for p in stage.shapes]
            self._places = {p: place for place, p in enumerate(tensors)}
        self._stages = stages

    def _make_stage(self, number: int, beside: Capture) -> Stage:
        group, policy_group = self.param_groups[number], self.policy_groups[number]
        preconditioning, policy, capture = policy_group.preconditioning, policy_group.policy, beside
        assert preconditioning.preconditioner is not None
        if isinstance(policy, Dense):  # nobody reads a momentum of ours
            capture = choose_capture(self.base, group, policy, self._wanted, False, rotated=True)
        members = self._members[number].parameters
        stage = Stage(preconditioning.preconditioner, preconditioning.matrix_view, capture, beside, members)
        if stage.shapes:
            moments = moments_of(self.base, group, capture.facts)
            check_moments(self.base, group, number, moments, stage.preconditioner)
        return stage

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
