"""RememberingJob: saves what the base's step will overwrite: parameters, gradients, momenta and factors of decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from selective import foreach
from selective.base.base_facts import decay_factor, momentum_entry
from selective.base.hyperparameters import plain_number, sign_of, sign_of_rate
from selective.capture.decay import own_factor
from selective.capture.items import KeptItems
from selective.capture.job import Job
from selective.kernels import spec


class RememberingJob(Job):
    """The job of a group whose base steps by itself; it has the gradients and momenta as a policy reads them."""

    def __init__(self, *args: Any, kept_items: KeptItems, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept_items = kept_items
        self.reads = kept_items.describe(self.policy).needs
        self.sign = sign_of(self.context.base, self.group)
        self.wants_grad = (
            "grad" in self.reads or self.context.own_momentum is not None or self.context.report is not None
        )
        self.wants_momentum = "momentum" in self.reads or self.context.own_momentum is not None
        self.grads: Sequence[Tensor | None] = ()  # as in the policy's view: after maximize and coupled decay
        self.previous: Sequence[Tensor | None] = ()
        self.factors: list[spec.Scalar] = []  # on each parameter, from decoupled decay
        self.rate = sign_of_rate(self.group)
        self.coupled: spec.Scalar = 0.0  # times the parameter, this is what the base adds to the raw gradient
        if self.facts.decay == "coupled":
            self.coupled = self.facts.decay_sign * plain_number(self.group.get("weight_decay", 0.0))

    @property
    def is_coupled(self) -> bool:
        return isinstance(self.coupled, Tensor) or self.coupled != 0  # reading a tensor's value may wait for a GPU

    def tensors(self) -> list[Tensor]:
        return [parameter.tensor for parameter in self.parameters]

    def raw_grads(self) -> list[Tensor]:
        return [p.grad for p in self.tensors() if p.grad is not None]

    def remember(self) -> None:
        """Save everything that the base's step will overwrite and that is needed afterwards."""
        # before the base steps, because some factors depend on the parameter's norm or on the base's step count
        self.factors = self._factors()
        self.saved = self.keep_parameters()
        nothing = [None] * len(self.parameters)
        self.previous = self._momenta_kept() if "previous_momentum" in self.reads else nothing
        self.grads = self._gradients() if self.wants_grad else nothing

    def keep_parameters(self) -> list[Tensor]:
        """Return the parameters' values, from which they are restored if something raises."""
        return foreach.copies(self.tensors())

    def _factors(self) -> list[spec.Scalar]:
        base, group, facts = self.context.base, self.group, self.facts
        factor = own_factor(self.decay, group)
        if factor is not None:
            return [factor] * len(self.parameters)
        if facts.decay != "decoupled" or not self.parameters:
            return [1.0] * len(self.parameters)
        if facts.decay_per_parameter:
            return [plain_number(decay_factor(base, group, facts, p)) for p in self.asked_for_decay()]
        return [plain_number(decay_factor(base, group, facts))] * len(self.parameters)

    def asked_for_decay(self) -> list[Tensor]:
        """Return the tensors that the base will step: a factor of decay may depend on them."""
        return self.tensors()

    def _gradients(self) -> list[Tensor]:
        raw = self.raw_grads()
        if self.is_coupled:
            decayed = foreach.sums(raw, self.saved, self.coupled, wide=True)
            if self.sign < 0:
                foreach.neg_(decayed)
            return decayed
        if self.sign < 0:
            return foreach.negated(raw)
        return foreach.copies(raw) if self.facts.writes_grad else raw

    def _own_momenta(self, indices: Sequence[int]) -> list[Tensor]:
        assert self.context.own_momentum is not None
        return [self.context.own_momentum(self.parameters[i]) for i in indices]

    def _stored_momentum(self, p: Tensor) -> tuple[Tensor, bool]:
        """Return the base's first moment, or zeros if there is none yet, and True if it shares the base's memory."""
        value, is_stored = momentum_entry(self.context.base, p, self.facts)
        return (torch.zeros_like(p), False) if value is None else (value, is_stored)

    def _momenta_kept(self) -> list[Tensor]:
        """Return copies of the present first moments."""
        if self.context.own_momentum is not None:
            return foreach.copies(self._own_momenta(range(len(self.parameters))))
        momenta = [self._stored_momentum(p) for p in self.tensors()]
        copies = iter(foreach.copies([value for value, is_stored in momenta if is_stored]))
        return [next(copies) if is_stored else value for value, is_stored in momenta]

    def momenta_now(self, indices: Sequence[int]) -> Sequence[Tensor | None]:
        """Return the first moments with this step's gradient in them; None if the policy does not read them."""
        if self.context.own_momentum is not None:
            assert self.context.momentum_beta is not None
            momenta = self._own_momenta(indices)
            grads = [grad for grad in (self.grads[i] for i in indices) if grad is not None]
            foreach.lerp_(momenta, grads, 1.0 - self.context.momentum_beta)
            return momenta
        if not self.wants_momentum:
            return [None] * len(indices)
        return [self._stored_momentum(self.parameters[i].tensor)[0] for i in indices]
