"""What the base's step will overwrite, kept before it runs: parameters, gradients, momenta, the factor of decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from selective import foreach
from selective.base.base_facts import decay_factor, momentum_entry
from selective.base.hyperparameters import plain_number, sign_of, sign_of_rate
from selective.capture.job import Job
from selective.kernels import spec


class RememberingJob(Job):
    """A group whose base steps by itself, with gradients and momenta as a policy reads them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reads = self.policy.needs()
        self.sign = sign_of(self.context.base, self.group)
        self.wants_grad = (
            "grad" in self.reads or self.context.own_momentum is not None or self.context.report is not None
        )
        self.wants_momentum = "momentum" in self.reads or self.context.own_momentum is not None
        self.grads: Sequence[Tensor | None] = ()  # the view's gradient: after maximize and coupled decay
        self.previous: Sequence[Tensor | None] = ()
        self.factors: list[spec.Scalar] = []  # of the parameter, where decay is decoupled
        self.rate = sign_of_rate(self.group)
        self.coupled: spec.Scalar = 0.0  # what of the parameter the base adds to the raw gradient
        if self.facts.decay == "coupled":
            self.coupled = self.facts.decay_sign * plain_number(self.group.get("weight_decay", 0.0))

    @property
    def is_coupled(self) -> bool:
        return isinstance(self.coupled, Tensor) or self.coupled != 0  # a tensor's value would have to be waited for

    def tensors(self) -> list[Tensor]:
        return [parameter.tensor for parameter in self.parameters]

    def raw_grads(self) -> list[Tensor]:
        return [p.grad for p in self.tensors() if p.grad is not None]

    def remember(self) -> None:
        """Keep what the base's step will overwrite."""
        # asked before the base steps: some factors depend on the parameter's size or on the base's count
        self.factors = self._factors()
        self.saved = self.keep_parameters()
        nothing = [None] * len(self.parameters)
        self.previous = self._momenta_kept() if "previous_momentum" in self.reads else nothing
        self.grads = self._gradients() if self.wants_grad else nothing

    def keep_parameters(self) -> list[Tensor]:
        """The parameters' values, which are put back when something raises."""
        return foreach.copies(self.tensors())

    def _factors(self) -> list[spec.Scalar]:
        base, group, facts = self.context.base, self.group, self.facts
        if facts.decay != "decoupled" or not self.parameters:
            return [1.0] * len(self.parameters)
        if facts.decay_per_parameter:
            return [plain_number(decay_factor(base, group, facts, p)) for p in self.asked_for_decay()]
        return [plain_number(decay_factor(base, group, facts))] * len(self.parameters)

    def asked_for_decay(self) -> list[Tensor]:
        """What the base steps, on which a factor of its own may depend."""
        return self.tensors()

    def _gradients(self) -> list[Tensor]:
        raw = self.raw_grads()
        if self.is_coupled:
            made = foreach.sums(raw, self.saved, self.coupled, wide=True)
            if self.sign < 0:
                foreach.neg_(made)
            return made
        if self.sign < 0:
            return foreach.negated(raw)
        return foreach.copies(raw) if self.facts.writes_grad else raw

    def _own_momenta(self, indices: Sequence[int]) -> list[Tensor]:
        assert self.context.own_momentum is not None
        return [self.context.own_momentum(self.parameters[i], self.policy) for i in indices]

    def _stored_momentum(self, p: Tensor) -> tuple[Tensor, bool]:
        """The base's first moment, zeros before there is one; and whether it is the base's own memory."""
        value, is_stored = momentum_entry(self.context.base, p, self.facts)
        return (torch.zeros_like(p), False) if value is None else (value, is_stored)

    def _momenta_kept(self) -> list[Tensor]:
        """Copies of the first moments as they are now."""
        if self.context.own_momentum is not None:
            return foreach.copies(self._own_momenta(range(len(self.parameters))))
        found = [self._stored_momentum(p) for p in self.tensors()]
        kept = iter(foreach.copies([value for value, is_stored in found if is_stored]))
        return [next(kept) if is_stored else value for value, is_stored in found]

    def momenta_now(self, indices: Sequence[int]) -> Sequence[Tensor | None]:
        """The first moments after this gradient was mixed in, where the policy reads them."""
        if self.context.own_momentum is not None:
            assert self.context.momentum_beta is not None
            momenta = self._own_momenta(indices)
            grads = [grad for grad in (self.grads[i] for i in indices) if grad is not None]
            foreach.lerp_(momenta, grads, 1.0 - self.context.momentum_beta)
            return momenta
        if not self.wants_momentum:
            return [None] * len(indices)
        return [self._stored_momentum(self.parameters[i].tensor)[0] for i in indices]
