"""Parameters that a base steps in the place of low-precision ones, in float32, with their state.

Not the parameters themselves with other data: torch drops the node that accumulates a parameter's gradient when its
data get another dtype, and with it what hangs there (the all-reduce of DistributedDataParallel).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from selective.base.hyperparameters import LOW_PRECISION


class StandIns:
    """Those of one group's job, from `put` to `give_back`."""

    def __init__(self, base: Optimizer, group: dict[str, Any]) -> None:
        self.base, self.group = base, group
        self.of: dict[Tensor, Parameter] = {}  # by the parameter

    def put(self, param: Tensor, value: Tensor, grad: Tensor) -> None:
        """The base steps `value` on `grad` (both float32) from here on, and not `param`."""
        stand_in, states = Parameter(value), self.base.state
        stand_in.grad = grad
        self.of[param] = stand_in
        if param in states:  # which keeps its place among the others
            states[stand_in] = {key: raised(entry, param) for key, entry in states[param].items()}

    def enter(self) -> None:
        """Into the group, when all are there. In the same list, in which another job of the group may have its own."""
        _exchange(self.group["params"], self.of)

    def give_back(self) -> dict[Tensor, Parameter]:
        """The parameters are in the group again, with the state of their stand-ins, which are returned."""
        left, states = self.of, self.base.state
        own: dict[Any, Tensor] = {stand_in: param for param, stand_in in left.items()}
        self.of = {}
        _exchange(self.group["params"], own)
        if any(stand_in in states and param not in states for param, stand_in in left.items()):
            made: list[Any] = [(own.get(key, key), entries) for key, entries in states.items()]  # in their order
            states.clear()
            states.update(made)
        for param, stand_in in left.items():
            if stand_in in states:
                states[param] = states.pop(stand_in)
        return left


def _exchange(params: list[Any], others: Mapping[Any, Any]) -> None:
    if others:
        params[:] = [others.get(p, p) for p in params]


def raised(value: Any, param: Tensor) -> Any:
    """A state entry in the precision of the stand-in: low-precision tensors of the parameter's shape become float32."""
    if isinstance(value, Tensor) and value.dtype in LOW_PRECISION and value.shape == param.shape:
        return value.float()
    return value
