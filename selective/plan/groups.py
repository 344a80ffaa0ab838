"""The plans of all parameter groups, which are kept from step to step and follow the base's groups."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.capture.choose import base_key, capture_key, choose_capture
from selective.capture.items import DeviceItems
from selective.plan.advice import warn_of_needless_mask, warn_of_stray_keys
from selective.plan.flattened import refuse_joined
from selective.plan.group_params import GroupParams
from selective.plan.group_plan import Choice, GroupPlan
from selective.plan.norm_plan import update_norms
from selective.plan.options import Options
from selective.plan.policy_groups import KEYS, PolicyGroup, take_keys
from selective.plan.refusals import check_complete, check_decay, check_flattened, check_momentum, check_shards
from selective.plan.rotation_plan import RotationPlan, check_change
from selective.plan.shared_parameters import check_sharing
from selective.preconditioner import Preconditioner
from selective.rotation.moments import check_moments, moments_of
from selective.sharding.dtensor import shard_of


class Changes(NamedTuple):
    """The result of an update of the plans, which the stored state has to follow."""

    switched: list[GroupPlan]  # whose policy or strength is of another class than before
    remaining: set[Tensor] | None  # the parameters that are left; None if none was removed


class Groups:
    """A plan for each of the base's parameter groups.

    `policies` are the public `policy_groups`. `places` numbers all rotated parameters, `shape_places` has for each the
    number of its group and shape. `first_address` is the address of the first parameter: not 0 if other optimizers that
    step together with this one come before it. A copy of an optimizer is given the `choices` of the original, one for
    each policy, by which it notices that a policy was switched.
    """

    def __init__(
        self,
        base: Optimizer,
        options: Options,
        default: PolicyGroup,
        policies: list[PolicyGroup] | None = None,
        choices: Sequence[Choice | None] = (),
    ) -> None:
        self.base, self.options, self.default = base, options, default
        self.policies = [] if policies is None else policies
        self.plans: list[GroupPlan] = []
        self.places: dict[Tensor, int] = {}
        self.shape_places: dict[Tensor, int] = {}
        self.first_address = 0
        self.recorded: list[DeviceItems] = []  # of groups that were edited since: CUDA graphs read their tables
        self._of_base: tuple[object, ...] = ()  # `base_key` of the base, as of the last step
        self._settled = False  # True if the last update got to its end
        self._was_settled = False  # True if any has
        self._clocked: set[torch.device] | None = None  # as of the last update; None: not asked for since
        self._edited = False  # whether parameters have left a group, and may have left all
        self._choices = list(zip(self.policies, choices, strict=False))  # of plans that are still to be made

    def update(self, with_basis: Container[Tensor] = frozenset()) -> Changes:
        """Update the plans to the base's groups and the policies; raise if a change can't be followed.

        `with_basis` has the parameters with a stored basis, which must stay the same.
        """
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        of_base = base_key(self.base)
        if not is_distributed and of_base == self._of_base and self._are_as_before():
            return Changes([], None)
        self._settled, self._clocked = False, None
        self._take_policies()
        plans = self.update_plans()
        self._of_base = of_base = self._of_base if of_base == self._of_base else of_base
        choices = [self._choose(plan, of_base, is_distributed) for plan in plans]
        switched = []
        for plan, choice in zip(plans, choices, strict=True):
            if choice is plan.choice:
                continue
            if plan.choice is not None and plan.choice.key[-1] != choice.key[-1]:
                switched.append(plan)
            plan.choice = choice
            plan.params.dtypes_checked = plan.params.state_checked = False
        self._plan_rotations(with_basis)
        update_norms(self.base, plans)
        self._check_sharing()
        changes = Changes(switched, self.forget_removed())
        self._settled = self._was_settled = True
        return changes

    def _are_as_before(self) -> bool:
        """True if an update would find all as the last one left it. What of the parameters has changed is marked.

        In most steps this is all that is looked at. `update` itself goes through the same groups again if it is False.
        """
        groups, plans = self.base.param_groups, self.plans
        if not (self._settled and len(groups) == len(plans) == len(self.policies)) or self._edited:
            return False
        address = self.first_address
        for number, (plan, group, policy_group) in enumerate(zip(plans, groups, self.policies, strict=True)):
            if plan.number != number or not plan.is_as_before(group, policy_group, address):
                return False
            address += len(plan.params.tensors)
        return True

    def update_plans(self) -> list[GroupPlan]:
        """Update the plans to the base's parameters and return them.

        A group that has no `PolicyGroup` yet gets no plan.
        """
        address = self.first_address
        groups = self.base.param_groups
        if len(self.policies) > len(groups):  # a group was removed; its plan is known as soon as its policy is, too
            return self.plans
        for number, (group, policy_group) in enumerate(zip(groups, self.policies, strict=False)):
            if number == len(self.plans):
                params, choice = GroupParams(group, number, address), self._choice_of(policy_group)
                if self._was_settled:  # a group that was added in training may have parameters of another one
                    params.arrived = set(params.tensors)
                self.plans.append(GroupPlan(number, group, policy_group, params, choice))
            elif len(self.plans) > len(groups) and self.plans[number].policy_group is not policy_group:
                self._drop_removed(number, policy_group)
            plan = self.plans[number]
            plan.group, plan.policy_group = group, policy_group
            if plan.number != number or not plan.params.are_of(group, address):
                self._set_aside(plan)
                plan.replace_params(GroupParams(group, number, address, plan.params))
                plan.number = number
            address += len(group["params"])
        for removed in self.plans[len(groups) :]:
            self._set_aside(removed)
        del self.plans[len(groups) :]
        return self.plans

    def forget_removed(self) -> set[Tensor] | None:
        """Forget removed parameters. Return the remaining ones; None if none was removed."""
        if not self._edited:
            return None
        there = {p for plan in self.plans for p in plan.params.tensors}
        self.places = {p: place for p, place in self.places.items() if p in there}
        self.shape_places = {p: place for p, place in self.shape_places.items() if p in there}
        for plan in self.plans:
            if plan.rotation is not None:
                plan.rotation.forget_all_but(there)
        self._edited = False
        return there

    def look_anew(self) -> None:
        """Drop all items and marks, because state was replaced: the next step rebuilds and rechecks."""
        for plan in self.plans:
            plan.params.arrived.clear()  # what was loaded or written is of this group
            plan.look_anew()

    def clocked(self) -> set[torch.device]:
        """The GPUs on which something is masked, whose steps are counted there: Note [the clock]."""
        if self._clocked is None:
            ours = (plan.rotation is not None or plan.norms is not None or not plan.steps_alone for plan in self.plans)
            masked = (plan for plan, is_ours in zip(self.plans, ours, strict=True) if is_ours)
            self._clocked = {device for plan in masked for device in plan.params.cuda_devices}
        return self._clocked

    def asks_others(self) -> bool:
        """True if a parameter that is masked has parts on other ranks, which a step has to ask."""
        asking = (plan for plan in self.plans if plan.norms is not None or not plan.is_dense)
        masked = (p for plan in asking for p in plan.params.tensors)
        return self.options.scope == "global" and any(shard_of(p) is not None for p in masked)

    def choices(self) -> list[Choice | None]:
        """Return the chosen capture for each policy; None if none was chosen yet."""
        return [self._choice_of(policy_group) for policy_group in self.policies]

    def turns(self, preconditioner: Preconditioner) -> tuple[dict[Tensor, int], int]:
        """Return the numbers by which this preconditioner's refreshes take turns, and how many there are."""
        if preconditioner.turns_of() == "parameters":
            return self.places, len(self.places)
        return self.shape_places, max(self.shape_places.values(), default=0) + 1

    def plan_of(self, param: object) -> GroupPlan | None:
        """Return the plan of the group that has this parameter; None if none has it."""
        return next((plan for plan in self.plans if plan.params.has(param)), None)

    def snapshot(self) -> Callable[[], None]:
        """Return a function that puts plans and policies back. The base's groups have to be put back before it."""
        plans = [(plan, plan.choice, plan.rotation) for plan in self.plans]
        policies = [
            (group, group.policy, group.decaying.decay, group.norming.norm, dict(vars(group.preconditioning)))
            for group in self.policies
        ]
        places, shape_places = self.places, self.shape_places

        def undo() -> None:
            self.policies[:] = [group for group, *_ in policies]
            for group, policy, decay, norm, before in policies:
                group.policy, group.decaying.decay, group.norming.norm = policy, decay, norm
                vars(group.preconditioning).update(before)
            self.plans[:] = [plan for plan, *_ in plans]
            for plan, choice, rotation in plans:
                plan.choice, plan.rotation = choice, rotation
            self.places, self.shape_places = places, shape_places
            self._settled = False
            self.update_plans()
            self.look_anew()

        return undo

    def take_in(self, group: dict[str, Any]) -> PolicyGroup:
        """Remove the keys of ours (`KEYS`) from a base group; return what they say as a `PolicyGroup`."""
        return take_keys(group, self.default, self.base.defaults)

    def _choice_of(self, policy_group: PolicyGroup) -> Choice | None:
        chosen = [(plan.policy_group, plan.choice) for plan in self.plans] + self._choices
        return next((choice for other, choice in chosen if other is policy_group), None)

    def _drop_removed(self, number: int, policy_group: PolicyGroup) -> None:
        """Drop the plans between `number` and that of `policy_group`, which has moved up; none if it has no plan."""
        later = (place for place, plan in enumerate(self.plans) if place > number and plan.policy_group is policy_group)
        end = next(later, number)
        for removed in self.plans[number:end]:
            self._set_aside(removed)
        del self.plans[number:end]

    def _set_aside(self, plan: GroupPlan) -> None:
        self.recorded += plan.kept.recorded
        self._edited = True

    def _choose(self, plan: GroupPlan, of_base: tuple[object, ...], is_distributed: bool) -> Choice:
        """Return the capture of a group: the one that it has, as long as nothing changes that the choice depends on."""
        number, params = plan.number, plan.params
        if not isinstance(plan.policy_group, PolicyGroup):
            raise TypeError(
                f"SelectiveUpdate: policy_groups[{number}] is {plan.policy_group!r}; its entries stay, set "
                f"opt.policy_groups[{number}].policy to a Policy instead"
            )
        plan.policy_group.listen(plan.kept.policy_changed)
        policy, decay, preconditioning = plan.policy, plan.decay, plan.preconditioning
        params.detect_changes()
        flags = plan.flags.of(plan.group)
        # while all of these are the same objects, the choice is the same, too, and nothing below has more to say
        chosen_by = [plan.choice, policy, decay, preconditioning.preconditioner, params, params.kinds, flags, of_base]
        if all(map(is_, chosen_by, plan.chosen_by)) and plan.chosen_by and not is_distributed and not params.joined:
            return plan.chosen_by[0]
        choice = self._choose_anew(plan, flags, of_base, is_distributed)
        plan.chosen_by = [choice, *chosen_by[1:]]
        return choice

    def _choose_anew(
        self, plan: GroupPlan, flags: tuple[Any, ...], of_base: tuple[object, ...], is_distributed: bool
    ) -> Choice:
        """Return the capture of a group in which something may have changed that the choice depends on."""
        number, params, policy, decay = plan.number, plan.params, plan.policy, plan.decay
        alone = plan.steps_alone and plan.norm is None and plan.preconditioning.preconditioner is None
        if (is_distributed or params.joined) and not alone:
            if is_distributed:
                check_flattened(params.parameters)
            if params.joined:
                refuse_joined(number, params.shapes, params.tensors)
        described = plan.kept.describe(policy)
        if len(plan.group) != plan.keys_checked:
            warn_of_stray_keys(plan.group, number, plan.policy_group, self.base.defaults, plan.keys_warned)
            plan.keys_checked = len(plan.group)
        rotates = plan.preconditioning.preconditioner is not None
        key = capture_key(of_base, flags, params.kinds, described.state_classes, described.needs, decay, rotates)
        if plan.choice is not None and plan.choice.key == key:
            return plan.choice
        own = self.options.keeps_momentum and not plan.is_dense  # nobody reads a momentum of ours there
        check_complete(policy, number)
        capture = choose_capture(self.base, plan.group, policy, self.options.capture, own, decay is not None, rotates)
        if decay is not None:
            check_decay(self.base, plan.group, number, decay, capture)
        check_momentum(self.base, plan.group, number, policy, capture, own)
        if capture.way != "dense":
            check_shards(params.parameters)
            warn_of_needless_mask(self.base, plan.group, number, policy, described.specs)
        return Choice(key, capture)

    def _check_sharing(self) -> None:
        """Refuse parameters that are there twice. Checked again if one was exchanged, or has other memory."""
        if not any(plan.params.memory_changed for plan in self.plans):
            return
        everything = [(parameter, plan) for plan in self.plans for parameter in plan.params.parameters]
        ours = [plan.masks_or_rotates(parameter) for parameter, plan in everything]
        check_sharing([parameter for parameter, _ in everything], ours)
        for plan in self.plans:
            plan.params.memory_changed = False

    def _plan_rotations(self, with_basis: Container[Tensor]) -> None:
        """Plan the rotation of every group, anew where a preconditioner, a capture or a parameter changed."""
        rotations = [self._rotation_of(plan, with_basis) for plan in self.plans]
        if rotations != [plan.rotation for plan in self.plans]:
            tensors = [p for rotation in rotations if rotation is not None for p in rotation.shapes]
            self.places = {p: place for place, p in enumerate(tensors)}
            kinds = {p: (n, r.shapes[p]) for n, r in enumerate(rotations) if r is not None for p in r.shapes}
            numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds.values()))}
            self.shape_places = {p: numbers[kind] for p, kind in kinds.items()}
        for plan, rotation in zip(self.plans, rotations, strict=True):
            plan.rotation = rotation

    def _rotation_of(self, plan: GroupPlan, with_basis: Container[Tensor]) -> RotationPlan | None:
        preconditioning = plan.preconditioning
        if preconditioning.preconditioner is None and preconditioning.planned is None:
            return None
        known: RotationPlan | None = preconditioning.planned if preconditioning.was_planned else None
        rotation = known
        if known is None or not known.is_of(preconditioning, plan.capture, plan.params.parameters):
            rotation = None if preconditioning.preconditioner is None else self._make_rotation(plan)
            plan.params.state_checked = plan.params.state_checked and rotation is known
            if preconditioning.was_planned and (known is None or any(p in with_basis for p in known.shapes)):
                check_change(known, rotation, plan.number)
        if rotation is not known or not preconditioning.was_planned:
            preconditioning.planned = rotation
        return rotation

    def _make_rotation(self, plan: GroupPlan) -> RotationPlan:
        preconditioner, capture = plan.preconditioning.preconditioner, plan.capture
        assert preconditioner is not None
        if plan.is_dense:  # nobody reads a momentum of ours
            wanted = self.options.capture
            capture = choose_capture(self.base, plan.group, plan.policy, wanted, False, needs_update=True, rotates=True)
        view, parameters = plan.preconditioning.matrix_view, plan.params.parameters
        rotation = RotationPlan(preconditioner, view, capture, plan.capture, parameters)
        if rotation.shapes:
            moments = moments_of(self.base, plan.group, capture.facts)
            check_moments(self.base, plan.group, plan.number, moments, preconditioner)
            rotation.full_steps = moments.full_steps
        return rotation

    def _take_policies(self) -> None:
        """One policy for each group: those of new groups are moved out of them."""
        groups, known = self.base.param_groups, self.base.defaults
        for number, group in enumerate(groups[: len(self.policies)]):
            if group.keys().isdisjoint(KEYS):
                continue
            late = next((key for key in KEYS if key in group and (key == "policy" or key not in known)), None)
            if late is not None:  # it would be without effect, and the group could not be saved
                way = f"opt.preconditioner_groups[{number}]'s"
                if late in ("decay", "norm"):
                    way = f"opt.{late}_groups[{number}].{late} or its"
                if late == "policy":
                    way = f"opt.policy_groups[{number}].policy (a Policy) or its"
                raise ValueError(
                    f"SelectiveUpdate: param_groups[{number}] got a {late!r} after it was taken in; remove it there, "
                    f"and set {way} hyper-parameters by name"
                )
        for group in groups[len(self.policies) :]:  # at construction, or added on the base itself
            self.policies.append(self.take_in(group))
        if len(self.policies) > len(groups):
            raise RuntimeError(
                f"SelectiveUpdate: the base has {len(groups)} parameter groups, policy_groups has "
                f"{len(self.policies)}: a group was removed; delete the same index from opt.policy_groups"
            )
