"""GenericJob: the base steps by itself, and the kernels mask the update that it made. Scratch and delta share it.

The kernels get a group's parameters together, in one call for each factor of decay, so that the number of device
operations does not grow with the number of tensors. If a call would need copies of all its parameters (delta's update,
a momentum in float32), it takes `foreach.PART` elements at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selective import foreach
from selective.base.hyperparameters import LOW_PRECISION, lookahead
from selective.capture.decay import decaying_coordinates
from selective.capture.own_code import masked_step
from selective.capture.remember import RememberingJob
from selective.kernels import apply_mask, begin_sharded, selective_step, spec, turned
from selective.policies.view import Tensors
from selective.sharding.dtensor import is_dtensor, local_like, local_of, shard_of


class Captured(NamedTuple):
    """The base's step of one parameter; the kernels read `update` and `start`, and write `target`."""

    update: Tensor
    start: Tensor
    target: Tensor


class GenericJob(RememberingJob):
    """The job of a group whose base steps by itself: its update is masked and applied afterwards."""

    offset, negated = 0.0, False  # of the GivenRule
    makes_updates = False  # True if `captured` makes new tensors

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls = 0
        at_random = self.decay is not None and self.decay.at_random  # no kernel draws
        self.specs = None if at_random else self.kept_items.specs(self.policy, self.parameters)
        self.kernel_decay = None if self.decay is None else self.decay.spec()  # of the next calls
        self.own_code = self.specs is None

    def captured(self, indices: Sequence[int]) -> list[Captured]:
        """Return the base's step of these parameters."""
        raise NotImplementedError

    def rule_factors(self) -> Sequence[spec.Scalar]:
        """Return the factor on each parameter's `start`."""
        return self.factors

    def after_base(self) -> None:
        beta = self._lookahead()
        for factor, indices in self._calls():
            self.step(indices, spec.GivenRule(factor, self.offset, self.negated, beta, self.rate))

    def _calls(self) -> Iterator[tuple[spec.Scalar, list[int]]]:
        """Iterate over the kernel calls: a factor and the indices of the parameters that share it.

        A policy's own code gets the parameters one by one, in their order.
        """
        if self.own_code:
            yield from ((factor, [index]) for index, factor in enumerate(self.rule_factors()))
            return
        for factor, indices in by_value(self.rule_factors()):
            if self._makes_copies():
                yield from ((factor, indices[part]) for part in foreach.parts([self.saved[i] for i in indices]))
            else:
                yield factor, indices

    def _makes_copies(self) -> bool:
        """True if a call makes tensors, so that one call for all would need another copy of the parameters."""
        if self.makes_updates or not self.wants_momentum:
            return self.makes_updates
        return self.facts.momentum_reader == "dequantize" or any(p.dtype in LOW_PRECISION for p in self.tensors())

    def step(self, indices: Sequence[int], rule: spec.GivenRule) -> None:
        """Take steps 6 and 7 for these parameters."""
        self.apply(indices, self.captured(indices), rule)

    def apply(self, indices: Sequence[int], captured: Sequence[Captured], rule: spec.GivenRule) -> None:
        """Mask these captured updates, and apply them."""
        momenta = self.momenta_now(indices)
        items = [self._item(i, c, m) for i, c, m in zip(indices, captured, momenta, strict=True)]
        if self.specs is None:
            for index, item in zip(indices, items, strict=True):
                self._apply_own_code(index, item, rule)
            self.stepped(indices)
            return
        for is_sharded in (False, True):
            places = [place for place, item in enumerate(items) if (item.shard is not None) == is_sharded]
            if places:
                part, part_indices = [items[place] for place in places], [indices[place] for place in places]
                self._step_items(part, part_indices, rule, is_sharded)

    def stepped(self, indices: Sequence[int]) -> None:
        """Called when these parameters are written."""

    def _step_items(self, items: list[spec.Item], indices: list[int], rule: spec.GivenRule, is_sharded: bool) -> None:
        """Let the kernels step these items. A sharded step is only begun: it goes on in the exchange of all groups."""
        assert self.specs is not None
        report, device = self.context.report, items[0].param.device
        how: dict[str, Any] = {
            "rule": rule, "selection": self.specs[0], "strength": self.specs[1],
            "draw": self.context.draw_on(device), "statistics": report is not None, "decay": self.kernel_decay,
        }  # fmt: skip

        def done(sums: Sequence[spec.Sums] | None) -> None:
            if sums is not None and report is not None:
                report.add_all([self.parameters[i].name for i in indices], sums)
            self.stepped(indices)

        passing = self.kept_items.passing(self.calls, items, self.policy, self.context.recording)
        self.calls += 1
        if is_sharded:
            self.context.exchange.add(begin_sharded(passing, **how), len(items), done)
        else:
            done(selective_step(passing, graphs=self.context.graphs, **how))

    def _item(self, index: int, captured: Captured, momentum: Tensor | None) -> spec.Item:
        """Return the kernels' item of one parameter, with this rank's parts of all tensors."""
        parameter, grad, previous = self.parameters[index], self.grads[index], self.previous[index]
        state = {"update": captured.update, "start": captured.start}
        if momentum is not None:
            state["momentum"] = momentum
        if previous is not None:
            state["previous_momentum"] = previous
        policy_state, p = self.context.own_state(parameter), parameter.tensor
        gradient = captured.update if grad is None else grad
        if not is_dtensor(p):
            return spec.Item(captured.target, gradient, state, parameter.address, policy_state)
        shard = None if self.context.local_scope else shard_of(p)
        state = {key: local_like(value, p) for key, value in state.items()}
        gradient = local_like(gradient, p)
        return spec.Item(local_of(captured.target), gradient, state, parameter.address, policy_state, shard)

    def _apply_own_code(self, index: int, item: spec.Item, rule: spec.GivenRule) -> None:
        """Mask one parameter's update by the policy's own code, and apply it."""
        parameter, grad = self.parameters[index], self.grads[index]
        dtype = torch.float64 if item.param.dtype == torch.float64 else torch.float32
        update = item.state["update"].to(dtype) * (-1.0 if rule.negated else 1.0)
        momentum, previous = item.state.get("momentum"), item.state.get("previous_momentum")
        gradient = None if grad is None else item.grad.to(dtype)
        gradient, momentum, previous = (turned(x, rule.rate) for x in (gradient, momentum, previous))
        param = local_of(self.saved[index])
        if "param" in self.reads:  # a policy that writes on it must not write on what is put back
            param = param.clone()
        tensors = Tensors(param, update, gradient, momentum, previous, rule.momentum_beta)
        mask = masked_step(self.context, self.policy, parameter, tensors, item.shard)
        if mask is None:
            return
        decays = self.decays_of(item, rule, update, mask, self.kernel_decay)
        apply_mask(item, rule, update, mask, self.context.draw_on(item.param.device), decays)

    def decays_of(
        self, item: spec.Item, rule: spec.GivenRule, update: Tensor, mask: Tensor, kernel_decay: spec.Decay | None
    ) -> Tensor | None:
        """Return True at the coordinates of one parameter that decay, in plain torch; None if all do."""
        if self.decay is None or kernel_decay is None:
            return None
        grad = turned(item.grad.to(update.dtype), rule.rate)
        assert grad is not None
        return decaying_coordinates(self.decay, kernel_decay, item, rule, update, mask, grad, self.context)

    def _lookahead(self) -> float:
        """Return the coefficient of the Nesterov score; 0 if nobody needs it: reading `betas` may wait for a GPU."""
        if self.specs is not None and self.specs[0].score != "nesterov":
            return 0.0
        beta = self.context.momentum_beta
        return lookahead(self.context.base, self.group) if beta is None else beta


def by_value(factors: Sequence[spec.Scalar]) -> list[tuple[spec.Scalar, list[int]]]:
    """Return each distinct factor with its places.

    Tensors are compared by identity, because reading their values may wait for a GPU.
    """
    by_key: dict[object, tuple[spec.Scalar, list[int]]] = {}
    for place, factor in enumerate(factors):
        key = id(factor) if isinstance(factor, Tensor) else factor
        by_key.setdefault(key, (factor, []))[1].append(place)
    return list(by_key.values())
