"""The items of one parameter group, handed to the kernels again in every step.

Making a thousand of them costs more than a GPU's whole step, and the GPU path keeps tables of addresses beside the
list. So they are kept while they hold; what they are made of is looked at in every step, by identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor

from selective.capture.job import StepContext
from selective.kernels import Backend, backend_in_use, spec
from selective.parameter import Parameter
from selective.policies import Policy
from selective.policies.kernel_terms import Described, Specs, specs_of, why_not_in_kernel
from selective.sharding.dtensor import is_dtensor, local_like, local_of, shard_of, wrapped_like


@dataclass
class DeviceItems:
    """The items on one device, with what belongs to them in the same order."""

    device: torch.device
    parameters: list[Parameter]
    names: list[str]
    items: spec.ItemList
    policy_class: type[Policy]
    dtensors: bool = False  # of local parts, which are looked up in every step ...
    asks: bool = False  # ... and selected from together with other ranks
    states: list[dict[str, Any]] = field(default_factory=list)  # the base's

    def take(self) -> None:
        """The gradients and the state of now."""
        if not self.dtensors:
            for item in self.items:
                item.grad = item.param.grad  # type: ignore[assignment]
            return
        for parameter, item, state in zip(self.parameters, self.items, self.states, strict=True):
            p = parameter.tensor
            assert p.grad is not None
            item.param, item.grad = local_of(p), local_like(p.grad, p)
            item.state = {key: local_like(value, p) for key, value in state.items()}

    def let_go(self) -> None:
        """Between steps `zero_grad` is to free gradients; state that the rule has made becomes the base's."""
        for item in self.items:
            item.grad = None  # type: ignore[assignment]
        if self.dtensors:
            for parameter, item, state in zip(self.parameters, self.items, self.states, strict=True):
                for key, value in item.state.items():
                    if state.get(key) is None:
                        state[key] = wrapped_like(value, parameter.tensor)


class KeptItems:
    """The items of one group from step to step. Belongs to one optimizer: copies and pickles make their own."""

    def __init__(self) -> None:
        self._lists: list[DeviceItems] = []
        self._parameters: list[Parameter] = []
        self._tensors: list[Tensor] = []
        self._states: list[dict[str, Any]] = []
        self._own: object = None
        self._described: Described | None = None
        self._asked: tuple[list[Parameter], Backend, bool] | None = None  # whether a selection's kernel runs on these
        # What a CUDA graph has recorded: replays read its tables, so they live on, and no later step may change them.
        self.recorded: list[DeviceItems] = []
        self._tables: dict[int, dict[Any, Any]] = {}  # of the lists of `passing`, by their number in a step

    def passing(self, number: int, items: list[spec.Item], policy: Policy, recording: bool) -> spec.ItemList:
        """The items of a captured update, which is new in every step; what stays are its tables.

        `number`: which call of the group's step it is.
        """
        made = spec.ItemList(items)
        if recording:
            self.recorded.append(DeviceItems(items[0].param.device, [], [], made, type(policy)))
        else:
            made.cache = self._tables.setdefault(number, made.cache)
        return made

    def drop(self) -> None:
        """Forget the items, so that state which was replaced is not kept in memory until the next step."""
        self._tables = {}
        self._lists, self._parameters, self._tensors, self._states, self._own = [], [], [], [], None
        self._asked = None

    @contextmanager
    def of(
        self, context: StepContext, parameters: list[Parameter], policy: Policy, make_state: Callable[..., None]
    ) -> Iterator[list[DeviceItems]]:
        """The items of these parameters, by device, with the gradients and the state of now.

        `make_state(p, state)` fills a state that is still empty. `parameters` is known by identity: a list of its own
        for each set of them, and for each dtype and device that they have had.
        """
        known = parameters is self._parameters
        tensors = self._tensors if known else [parameter.tensor for parameter in parameters]
        table = context.base.state
        states = [table[p] for p in tensors]
        if not all(states):
            for p, state in zip(tensors, states, strict=True):
                if not state:
                    make_state(p, state)
        if not (known and self._own is context.own_table and all(map(is_, states, self._states))):
            self._lists = _build(context, parameters, states, policy)
            self._parameters, self._tensors, self._states = parameters, tensors, states
            self._own = context.own_table
        lists = self._lists
        try:
            for one in lists:
                one.take()
            yield lists
        finally:
            for one in lists:
                if not one.asks:
                    one.let_go()
            if context.recording:
                self.recorded += lists
                self.drop()

    def describe(self, policy: Policy) -> Described:
        """What `policy` says of itself."""
        if self._described is None or self._described.policy is not policy:
            self._described = Described(policy, policy.needs(), specs_of(policy))
        return self._described

    def specs(self, policy: Policy, parameters: list[Parameter]) -> Specs | None:
        """`policy` in the kernels' terms, where they can step these parameters by it; None: its own code has to.

        `parameters` is known by identity, as in `of`.
        """
        described = self.describe(policy)
        if described.is_anywhere:
            return described.specs
        backend, asked = backend_in_use(), self._asked
        if asked is None or asked[0] is not parameters or asked[1] != backend:
            assert described.specs is not None
            runs = why_not_in_kernel(described.specs[0], (parameter.tensor for parameter in parameters)) is None
            asked = self._asked = (parameters, backend, runs)
        return described.specs if asked[2] else None

    def policy_changed(self, policy: Policy) -> None:
        """Tell the tables on the device: the replays of a graph take a scheduled hyper-parameter from there."""
        for one in (*self.recorded, *self._lists):
            refresh = one.items.cache.get("refresh")
            if refresh is None or one.policy_class is not type(policy):
                continue  # of another kind: a graph goes on as it was recorded
            specs = specs_of(policy)
            if specs is not None:
                refresh(*specs)


def _build(
    context: StepContext, parameters: list[Parameter], states: list[dict[str, Any]], policy: Policy
) -> list[DeviceItems]:
    found: dict[tuple[torch.device, bool, bool], DeviceItems] = {}
    for parameter, state in zip(parameters, states, strict=True):
        p = parameter.tensor
        shard = None if context.local_scope else shard_of(p)
        key = p.device, is_dtensor(p), shard is not None
        one = found.get(key)
        if one is None:
            one = DeviceItems(p.device, [], [], spec.ItemList(), type(policy), dtensors=key[1], asks=key[2])
            found[key] = one
        own = context.own_state(parameter, policy)
        one.parameters.append(parameter)
        one.names.append(parameter.name)
        one.states.append(state)
        # the gradient comes in every step
        one.items.append(spec.Item(local_of(p), local_of(p), state, parameter.address, own, shard))
    return list(found.values())
