"""MuonJob: the update of torch's Muon, made for all matrices of a group together.

torch steps its matrices one after the other, with some thirty operations each, so that a GPU waits for the host. Here
the momenta move in one operation on lists, matrices of one shape are orthogonalised in one stack (`muon_stacks`), and
the kernels mask and apply the updates of many stacks in one call.

Memory, during the step: 4 bytes for each element of `foreach.PART` at a time, which become the updates, and at most 8
for each element of a stack, together 512 MiB. A single matrix that is larger than a stack takes those 8 bytes, too. In
low precision there are, before the stacks, float32 copies of the part's momenta. Nothing is kept from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from selective import foreach
from selective.base.fused_rules import FusedRule
from selective.base.hyperparameters import check_numbers
from selective.base.muon import MuonNumbers, numbers_of
from selective.capture.generic import Captured, GenericJob, by_value
from selective.capture.muon_stacks import Stack, parts_in_stacks
from selective.kernels import newton_schulz_, spec


class MuonJob(GenericJob):
    """The job of a group whose base is torch's Muon, of plain matrices."""

    steps_base = False
    numbers: MuonNumbers  # of this step

    def __init__(self, *args: Any, fused_rule: FusedRule, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fused_rule = fused_rule

    def prepare(self) -> None:
        check_numbers(self.context.base, self.group)
        self.numbers = numbers_of(self.group)

    def before_base(self) -> None:
        self.remember()

    def keep_parameters(self) -> list[Tensor]:
        """Return copies if a policy's own code may raise when half of the parameters are written; otherwise nothing."""
        return foreach.copies(self.tensors()) if self.own_code else []

    def after_base(self) -> None:
        beta = self._lookahead()
        for part in parts_in_stacks(self.tensors()):
            self._step_part(part, beta)  # a call of its own, so that its memory is free before the next

    def _step_part(self, part: Sequence[Stack], beta: float) -> None:
        """Step the parameters of these stacks."""
        indices = [index for stack in part for index in stack.indices]
        updates = self._updates(part, indices)
        for factor, places in by_value([self.factors[i] for i in indices]):
            rule = spec.GivenRule(factor, self.offset, self.negated, beta, self.rate)
            tensors = [self.parameters[indices[place]].tensor for place in places]
            captured = [Captured(updates[place], p, p) for place, p in zip(places, tensors, strict=True)]
            self.apply([indices[place] for place in places], captured, rule)

    def _updates(self, part: Sequence[Stack], indices: Sequence[int]) -> list[Tensor]:
        """Move the momenta of these parameters, and return their updates, in float32 or float64."""
        numbers = self.numbers
        stacks = [[self._empty(alike) for alike in stack.orientations] for stack in part]
        updates = [matrix for oriented in stacks for memory in oriented for matrix in memory.unbind()]
        self._move(indices, updates)
        for oriented in stacks:
            rates = [numbers.rate_of(tuple(memory.shape[1:])) for memory in oriented]
            newton_schulz_(oriented, rates, steps=numbers.steps, coefficients=numbers.coefficients, eps=numbers.eps)
        return updates

    def _empty(self, indices: Sequence[int]) -> Tensor:
        """Return memory for a stack of these matrices, which have one shape."""
        like = self.parameters[indices[0]].tensor
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return torch.empty((len(indices), *like.shape), dtype=dtype, device=like.device)

    def _move(self, indices: Sequence[int], directions: Sequence[Tensor]) -> None:
        """Move the momenta as torch does, bit for bit, and write to `directions` what is orthogonalised."""
        tensors = [self.parameters[i].tensor for i in indices]
        grads = [p.grad for p in tensors if p.grad is not None]
        momenta = [self._momentum(p) for p in tensors]
        momentum = self.numbers.momentum
        foreach.lerp_(momenta, grads, 1 - momentum)
        foreach.copy_(directions, grads if self.numbers.nesterov else momenta)
        if self.numbers.nesterov:
            foreach.lerp_(directions, momenta, momentum)

    def _momentum(self, p: Tensor) -> Tensor:
        state = self.context.base.state[p]
        if not state:
            self.fused_rule.init_state(self.group, p, state)
        return state["momentum_buffer"]
