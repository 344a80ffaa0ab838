"""StandIns: float32 parameters that a base steps in place of low-precision ones, with their state.

Exchanging the `.data` of the parameters would not do. If its dtype changes, torch drops the node that accumulates the
parameter's gradient, and the hooks on that node (the all-reduce of DistributedDataParallel).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from selective.base.hyperparameters import LOW_PRECISION


class StandIns:
    """The stand-ins of one group's job, from `put` to `give_back`."""

    def __init__(self, base: Optimizer, group: dict[str, Any]) -> None:
        self.base, self.group = base, group
        self.of: dict[Tensor, Parameter] = {}  # parameter -> its stand-in

    def put(self, param: Tensor, value: Tensor, grad: Tensor) -> None:
        """Make a stand-in for `param` with this value and gradient, both float32, and with the base's state."""
        stand_in, states = Parameter(value), self.base.state
        stand_in.grad = grad
        self.of[param] = stand_in
        if param in states:  # it stays there, so that the order of the states is kept
            states[stand_in] = {key: raised(entry, param) for key, entry in states[param].items()}

    def enter(self) -> None:
        """Put all stand-ins into the group. Its list stays the same object: another job may have stand-ins in it."""
        _exchange(self.group["params"], self.of)

    def give_back(self) -> dict[Tensor, Parameter]:
        """Put the parameters into the group again, with the state of their stand-ins; return the stand-ins."""
        stand_ins, states = self.of, self.base.state
        params: dict[Any, Tensor] = {stand_in: param for param, stand_in in stand_ins.items()}
        self.of = {}
        _exchange(self.group["params"], params)
        if any(stand_in in states and param not in states for param, stand_in in stand_ins.items()):
            in_order: list[Any] = [(params.get(key, key), entries) for key, entries in states.items()]
            states.clear()
            states.update(in_order)
        for param, stand_in in stand_ins.items():
            if stand_in in states:
                states[param] = states.pop(stand_in)
        return stand_ins


def _exchange(params: list[Any], others: Mapping[Any, Any]) -> None:
    if others:
        params[:] = [others.get(p, p) for p in params]


def raised(value: Any, param: Tensor) -> Any:
    """Return a state entry for the stand-in: low-precision tensors of the parameter's shape become float32."""
    if isinstance(value, Tensor) and value.dtype in LOW_PRECISION and value.shape == param.shape:
        return value.float()
    return value
