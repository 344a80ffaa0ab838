"""Delta capture: parameter before minus parameter after, for bases whose update looks at the parameter.

Applied as p_after + (1 - mask) u, which is exactly the base's result where the mask is 1. In bfloat16 and float16 that
difference is mostly rounding (small updates vanish in it), so there the base steps a float32 copy; its parameter-shaped
state is float32 then. Where the base keeps what rounding takes from the parameter (Kahan summation), its float32 copy
needs no such thing, and we keep the residue instead, in one buffer of the parameter's dtype as the base would have.
Costs two copies of the parameters during the step; of low-precision ones, one and float32 copies of parameter and
gradient, five of theirs in bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selective.capture.base import Parameter
from selective.capture.scratch import GenericJob
from selective.kernels import spec

LOW_PRECISION = (torch.bfloat16, torch.float16)


class DeltaJob(GenericJob):
    """The base steps the parameter itself, or its float32 copy."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stand_ins: dict[int, Tensor] = {}  # index of a low-precision parameter -> its float32 copy
        self.started: dict[int, Tensor] = {}  # ... and its value before the step, where a residue was added
        self.params: list[Tensor] = []  # the group's own list, while stand-ins are in it

    def prepare(self) -> None:
        for index, parameter in enumerate(self.parameters):
            before = parameter.tensor.clone()
            self.saved.append(before)
            self.remember(parameter, before)
            if before.dtype in LOW_PRECISION:
                self.stand_ins[index] = self._stand_in(parameter)
                if self.facts.residue:  # otherwise it is the saved value, in float32
                    self.started[index] = self.stand_ins[index].detach().clone()
        if self.stand_ins:
            self.params = self.group["params"]
            by_param = {self.parameters[index].tensor: stand_in for index, stand_in in self.stand_ins.items()}
            self.group["params"] = [by_param.get(p, p) for p in self.params]

    def _stand_in(self, parameter: Parameter) -> Tensor:
        p = parameter.tensor
        value = p.detach().float()
        if self.facts.residue:
            value += self.context.own_residue(parameter, self.policy).float()
        stand_in = torch.nn.Parameter(value)
        assert p.grad is not None
        stand_in.grad = p.grad.float()
        states = self.context.base.state
        if p in states:
            states[stand_in] = {key: _raised(value, p) for key, value in states.pop(p).items()}
        return stand_in

    def _give_state_back(self) -> None:
        if self.params:
            self.group["params"], self.params = self.params, []
        states = self.context.base.state
        for index, stand_in in self.stand_ins.items():
            if stand_in in states:
                states[self.parameters[index].tensor] = states.pop(stand_in)

    def finish(self) -> None:
        self._give_state_back()
        for index, parameter in enumerate(self.parameters):
            before, after = self.saved[index], parameter.tensor
            if index in self.stand_ins:
                before, after = self.started.get(index, before.float()), self.stand_ins[index].detach()
            update = before - after
            if self.facts.decay == "decoupled":
                update = update - before * (1.0 - self.factors[index])
            rule = spec.GivenRule(offset=1.0, momentum_beta=self.lookahead())
            self.apply(index, update, after, rule, into=after if self._keeps_residue(index) else None)
            if self._keeps_residue(index):
                parameter.tensor.copy_(after)
                self.context.own_residue(parameter, self.policy).copy_(after - parameter.tensor.float())

    def _keeps_residue(self, index: int) -> bool:
        return index in self.stand_ins and bool(self.facts.residue)

    def restore(self) -> None:
        self._give_state_back()
        super().restore()


def _raised(value: Any, param: Tensor) -> Any:
    """A state entry in the precision of the stand-in: low-precision tensors of the parameter's shape become float32."""
    if isinstance(value, Tensor) and value.dtype in LOW_PRECISION and value.shape == param.shape:
        return value.float()
    return value
