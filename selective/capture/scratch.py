"""Scratch capture: the base steps on zeros that stand in for the parameter, and what it leaves there is exactly -u.

Right for every base whose update does not look at the parameter. Costs one copy of the parameters during the step (and
one of the gradients where decay is coupled). The storage is zeroed in place rather than swapped, because a base may
hold the tensor by identity and because swapping `.data` has no effect on a DTensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selective.capture.anatomy import decay_factor, read_momentum
from selective.capture.base import Job, Parameter, lookahead, scalar, sign_of
from selective.capture.custom import has_own_code, kernel_specs, run_mask
from selective.kernels import apply_mask, selective_step, spec
from selective.view import Tensors


class GenericJob(Job):
    """What scratch and delta share: gradients and momenta around the base's own step, then the mask as `given`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reads = self.policy.needs()
        self.wants_grad = (
            "grad" in self.reads or self.context.own_momentum is not None or self.context.report is not None
        )
        self.grads: list[Tensor | None] = []  # the view's gradient: after maximize and coupled decay
        self.previous: list[Tensor | None] = []
        self.factors: list[spec.Scalar] = []  # of the parameter, where decay is decoupled
        self.coupled = 0.0  # what of the parameter the base adds to the raw gradient
        if self.facts.decay == "coupled":
            self.coupled = self.facts.decay_sign * scalar(self.group.get("weight_decay", 0.0))

    def remember(self, parameter: Parameter, before: Tensor) -> None:
        """Keep what the base's step will overwrite."""
        decoupled = self.facts.decay == "decoupled"
        # asked before the base steps: some factors depend on the parameter's size or on the base's count
        factor = decay_factor(self.context.base, self.group, self.facts, parameter.tensor) if decoupled else 1.0
        self.factors.append(factor)
        self.previous.append(self._momentum(parameter) if "previous_momentum" in self.reads else None)
        self.grads.append(self._gradient(parameter, before) if self.wants_grad else None)

    def _gradient(self, parameter: Parameter, before: Tensor) -> Tensor:
        grad = parameter.tensor.grad
        assert grad is not None
        sign = sign_of(self.context.base, self.group)
        if self.coupled:
            dtype = torch.float64 if before.dtype == torch.float64 else torch.float32
            return torch.add(grad.to(dtype), before.to(dtype), alpha=self.coupled).mul_(sign)
        if sign < 0:
            return -grad
        return grad.clone() if self.facts.writes_grad else grad

    def _momentum(self, parameter: Parameter) -> Tensor:
        """A copy of the first moment as it is now; zeros before there is one."""
        if self.context.own_momentum is not None:
            return self.context.own_momentum(parameter, self.policy).clone()
        value = self._stored_momentum(parameter)
        return torch.zeros_like(parameter.tensor) if value is None else value.clone()

    def _stored_momentum(self, parameter: Parameter) -> Tensor | None:
        return read_momentum(self.context.base, parameter.tensor, self.facts)

    def _current_momentum(self, index: int) -> Tensor | None:
        """The first moment after this gradient was mixed in, where the policy reads it."""
        parameter = self.parameters[index]
        if self.context.own_momentum is not None:
            momentum, grad = self.context.own_momentum(parameter, self.policy), self.grads[index]
            assert grad is not None
            assert self.context.momentum_beta is not None
            return momentum.lerp_(grad.to(momentum.dtype), 1.0 - self.context.momentum_beta)
        if "momentum" not in self.reads:
            return None
        value = self._stored_momentum(parameter)
        return torch.zeros_like(parameter.tensor) if value is None else value

    def apply(
        self, index: int, update: Tensor, start: Tensor, rule: spec.GivenRule, into: Tensor | None = None
    ) -> None:
        """Steps 6 and 7 of one parameter, whose update was captured; the result goes `into` it, or elsewhere."""
        parameter = self.parameters[index]
        momentum = self._current_momentum(index)
        state = {"update": update, "start": start}
        if momentum is not None:
            state["momentum"] = momentum
        previous = self.previous[index]
        if previous is not None:
            state["previous_momentum"] = previous
        grad = self.grads[index]
        own = self.context.own_state(parameter, self.policy)
        target = parameter.tensor if into is None else into
        item = spec.Item(target, update if grad is None else grad, state, parameter.address, own)
        if has_own_code(self.policy):
            self._apply_own_code(index, item, rule, grad)
        else:
            self._apply_in_kernel(parameter, item, rule)

    def _apply_in_kernel(self, parameter: Parameter, item: spec.Item, rule: spec.GivenRule) -> None:
        context = self.context
        selection, strength = kernel_specs(self.policy)
        sums = selective_step(
            [item], rule=rule, selection=selection, strength=strength, draw=context.draw,
            statistics=context.report is not None,
        )  # fmt: skip
        if sums is not None and context.report is not None:
            context.report.add(parameter.name, sums[0])

    def _apply_own_code(self, index: int, item: spec.Item, rule: spec.GivenRule, grad: Tensor | None) -> None:
        if item.param.numel() == 0:
            return
        parameter = self.parameters[index]
        dtype = torch.float64 if item.param.dtype == torch.float64 else torch.float32
        update = item.state["update"].to(dtype) * (-1.0 if rule.negated else 1.0)
        momentum, previous = item.state.get("momentum"), item.state.get("previous_momentum")
        tensors = Tensors(
            self.saved[index], update, grad, momentum, previous, rule.momentum_beta,
        )  # fmt: skip
        mask = run_mask(self.context, self.policy, parameter, tensors)
        if self.context.report is not None:
            self.context.report.add_masked(parameter.name, mask, update, None if grad is None else grad.to(dtype))
        apply_mask(item, rule, update, mask, self.context.draw)

    def lookahead(self) -> float:
        own = self.context.momentum_beta
        return lookahead(self.context.base, self.group) if own is None else own


class ScratchJob(GenericJob):
    """The base steps on zeros."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.their_grads: list[tuple[Tensor, Tensor | None, Tensor]] = []  # parameter, its gradient, our stand-in

    def prepare(self) -> None:
        for parameter in self.parameters:
            p = parameter.tensor
            before = p.clone()
            self.saved.append(before)
            self.remember(parameter, before)
            if self.coupled:  # decay vanishes on zeros: give the base the gradient that it would have made
                stand_in = self._decayed_gradient(p, before, self.grads[-1])
                self.their_grads.append((p, p.grad, stand_in))
                p.grad = stand_in
            p.zero_()

    def _decayed_gradient(self, p: Tensor, before: Tensor, seen: Tensor | None) -> Tensor:
        """The gradient with decay in it, as the base would have made it; the policy's own where that is the same."""
        assert p.grad is not None
        same = seen is not None and seen.dtype == p.grad.dtype and sign_of(self.context.base, self.group) > 0
        if seen is not None and same and not self.facts.writes_grad:
            return seen
        return torch.add(p.grad, before, alpha=self.coupled)

    def finish(self) -> None:
        self._give_gradients_back()
        for index, parameter in enumerate(self.parameters):
            p, before = parameter.tensor, self.saved[index]
            rule = spec.GivenRule(factor=self.factors[index], negated=True, momentum_beta=self.lookahead())
            self.apply(index, p, before, rule)

    def restore(self) -> None:
        self._give_gradients_back()
        super().restore()

    def _give_gradients_back(self) -> None:
        for p, grad, stand_in in self.their_grads:
            if p.grad is stand_in:  # unless the base cleared it
                p.grad = grad
        self.their_grads = []
