"""The kernels' items of one parameter group, which are kept from step to step.

Making a thousand items takes longer than a GPU's whole step, and the GPU path keeps tables of addresses beside them. So
they are made anew only if something they are made of was replaced. Every step compares that by identity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.fused_rules import FusedRule
from selective.base.hyperparameters import check_numbers
from selective.capture.job import StepContext
from selective.kernels import Backend, backend_in_use, spec
from selective.parameter import Parameter
from selective.policies import Policy
from selective.policies.kernel_terms import Described, Specs, specs_of, state_classes_of, why_not_in_kernel
from selective.sharding.dtensor import is_dtensor, local_like, local_of, shard_of, wrapped_like


@dataclass
class DeviceItems:
    """The items on one device; all lists are in the same order."""

    device: torch.device
    parameters: list[Parameter]
    names: list[str]
    items: spec.ItemList
    policy_class: type[Policy]
    dtensors: bool = False  # True: the items are of local parts, which are looked up in every step
    is_sharded: bool = False  # True: the kernels select from the whole tensors, together with other ranks
    states: list[dict[str, Any]] = field(default_factory=list)  # the base's state of each parameter

    def take(self) -> None:
        """Put the present gradients into the items, and the present state into those of DTensors."""
        if not self.dtensors:
            for item in self.items:
                item.grad = item.param.grad  # type: ignore[assignment]
            return
        for parameter, item, state in zip(self.parameters, self.items, self.states, strict=True):
            p = parameter.tensor
            assert p.grad is not None
            item.param, item.grad = local_of(p), local_like(p.grad, p)
            if item.state is state or not _are_locals(item.state, state):
                item.state = {key: local_like(value, p) for key, value in state.items()}

    def let_go(self) -> None:
        """Drop the gradients, so that `zero_grad` frees them, and give the base the state that the rule has made."""
        for item in self.items:
            item.grad = None  # type: ignore[assignment]
        if self.dtensors:
            for parameter, item, state in zip(self.parameters, self.items, self.states, strict=True):
                for key, value in item.state.items():
                    if state.get(key) is None:
                        state[key] = wrapped_like(value, parameter.tensor)


class KeptItems:
    """The items of one group, kept from step to step. They are neither copied nor pickled with the optimizer."""

    def __init__(self) -> None:
        self._lists: list[DeviceItems] = []
        self._parameters: list[Parameter] = []
        self._tensors: list[Tensor] = []
        self._states: list[dict[str, Any]] = []
        self._own: object = None
        self._token: object = None  # `StepContext.base_token` of a step in which the base had all of `_states`
        self._described: Described | None = None
        self._rule: spec.Rule | None = None  # the last answer of `rule`, and what it follows from
        self._rule_of: tuple[object, ...] = ()
        # The last answer of `specs`: True if the selection's kernel runs on these parameters with this backend.
        self._asked: tuple[list[Parameter], Backend, bool] | None = None
        # The items that a CUDA graph has recorded. Its replays read their tables, which no later step may change.
        self.recorded: list[DeviceItems] = []
        self._tables: dict[int, dict[Any, Any]] = {}  # the caches of `passing` lists, by the number of the call

    def passing(self, number: int, items: list[spec.Item], policy: Policy, recording: bool) -> spec.ItemList:
        """Return an `ItemList` of items that are made in every step, with the tables of the step before.

        `number` is that of the kernel call in the group's step.
        """
        item_list = spec.ItemList(items)
        if recording:
            self.recorded.append(DeviceItems(items[0].param.device, [], [], item_list, type(policy)))
        else:
            item_list.cache = self._tables.setdefault(number, item_list.cache)
        return item_list

    def drop(self) -> None:
        """Forget the items, so that state which was replaced is not kept in memory until the next step."""
        self._tables = {}
        self._lists, self._parameters, self._tensors, self._states, self._own = [], [], [], [], None
        self._asked = self._token = None

    def with_gradients(
        self, context: StepContext, parameters: list[Parameter], policy: Policy, make_state: Callable[..., None]
    ) -> list[DeviceItems]:
        """Return the items of these parameters by device, with the present gradients and state.

        The caller lets the gradients go again (`DeviceItems.let_go`). `make_state(p, state)` fills an empty state.
        `parameters` is compared by identity: the caller makes a new list whenever the set of parameters changes, or the
        dtype or device of one.
        """
        token = context.base_token
        if not parameters:  # the lists stay: the group comes back to them, and they to the tables of the kernels
            if token is not self._token:  # state may have been replaced
                self.drop()
            return []
        if not (
            parameters is self._parameters
            and token is not None
            and token is self._token
            and self._own is context.own_table
            and all(self._states)
        ):
            self._look_up(context, parameters, policy, make_state)
        all_items = self._lists
        for device_items in all_items:
            device_items.take()
        if context.recording:
            self.recorded += all_items
            self.drop()
        return all_items

    def _look_up(
        self, context: StepContext, parameters: list[Parameter], policy: Policy, make_state: Callable[..., None]
    ) -> None:
        """Look up the state of each parameter, and make the items anew if one of them was replaced."""
        known = parameters is self._parameters
        tensors = self._tensors if known else [parameter.tensor for parameter in parameters]
        states = list(map(context.base.state.__getitem__, tensors))
        complete = all(states)
        if not complete:
            for p, state in zip(tensors, states, strict=True):
                if not state:
                    make_state(p, state)
        if not (known and self._own is context.own_table and all(map(is_, states, self._states))):
            self._lists = _build(context, parameters, states, policy)
            self._parameters, self._tensors, self._states = parameters, tensors, states
            self._own = context.own_table
        self._token = context.base_token if complete else None

    def rule(self, fused_rule: FusedRule, base: Optimizer, group: dict[str, Any]) -> spec.Rule:
        """Return the group's hyper-parameters as a rule: the same object, as long as nothing of it was replaced.

        Raises TypeError or ValueError if one of them is no number.
        """
        try:
            numbers = fused_rule.numbers(group)
        except (TypeError, ValueError):
            check_numbers(base, group)
            raise
        if numbers is None:
            check_numbers(base, group)
            return fused_rule.kernel_rule(base, group)
        rule_of = fused_rule, *numbers
        if self._rule is None or not all(map(is_, rule_of, self._rule_of)):
            check_numbers(base, group)
            self._rule, self._rule_of = fused_rule.kernel_rule(base, group), rule_of
        return self._rule

    def describe(self, policy: Policy) -> Described:
        """Return what the policy reads, and its terms for the kernels; computed once for each policy object."""
        if self._described is None or self._described.policy is not policy:
            self._described = Described(policy, policy.needs(), specs_of(policy), state_classes_of(policy))
        return self._described

    def specs(self, policy: Policy, parameters: list[Parameter]) -> Specs | None:
        """Return `policy` in the kernels' terms; None if its own code has to run on these parameters.

        `parameters` is compared by identity, as in `with_gradients`.
        """
        described = self.describe(policy)
        if described.same_for_all_parameters:
            return described.specs
        backend, asked = backend_in_use(), self._asked
        if asked is None or asked[0] is not parameters or asked[1] != backend:
            assert described.specs is not None
            runs = why_not_in_kernel(described.specs[0], (parameter.tensor for parameter in parameters)) is None
            asked = self._asked = (parameters, backend, runs)
        return described.specs if asked[2] else None

    def describe_launches(self) -> list[str]:
        """The ways in which the last step's launches were made, in words; none before the first step, and on a CPU."""
        caches = [*(each.items.cache for each in self._lists), *self._tables.values()]
        described = (cache.get("describe_launches") for cache in caches)
        return [text for describe in described if describe is not None for text in describe()]

    def policy_changed(self, policy: Policy) -> None:
        """Write the policy's numbers into the tables on the device, from which replays of a CUDA graph read them."""
        for device_items in (*self.recorded, *self._lists):
            upload = device_items.items.cache.get("upload_hyperparameters")
            if upload is None or device_items.policy_class is not type(policy):
                continue  # a policy of another class: the graph goes on as it was recorded
            specs = specs_of(policy)
            if specs is not None:
                upload(*specs)


def _are_locals(known: dict[str, Any], state: dict[str, Any]) -> bool:
    """True if `known` has the local tensors of `state`: nothing was replaced since, and nothing is redistributed."""
    if len(known) != len(state):
        return False
    return all(known.get(key) is local_of(value) for key, value in state.items())


def _build(
    context: StepContext, parameters: list[Parameter], states: list[dict[str, Any]], policy: Policy
) -> list[DeviceItems]:
    by_kind: dict[tuple[torch.device, bool, bool], DeviceItems] = {}
    for parameter, state in zip(parameters, states, strict=True):
        p = parameter.tensor
        shard = None if context.local_scope else shard_of(p)
        key = p.device, is_dtensor(p), shard is not None
        device_items = by_kind.get(key)
        if device_items is None:
            device_items = DeviceItems(
                p.device, [], [], spec.ItemList(), type(policy), dtensors=key[1], is_sharded=key[2]
            )
            by_kind[key] = device_items
        policy_state = context.own_state(parameter)
        device_items.parameters.append(parameter)
        device_items.names.append(parameter.name)
        device_items.states.append(state)
        # the parameter stands in for the gradient, which `take` puts in
        device_items.items.append(spec.Item(local_of(p), local_of(p), state, parameter.address, policy_state, shard))
    return list(by_kind.values())
