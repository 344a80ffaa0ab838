"""Matrices of equal shapes in stacks, so that a prototype steps them together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Stack:
    """The matrices of one shape in a group. Those that have a gradient step.

    Its state has tensors [count, ...], with the matrices in the order of their group. It is the optimizer's state of
    the first of them, so that the optimizer saves and loads it.
    """

    def __init__(self, optimizer: Optimizer, group: dict[str, Any], params: Sequence[Tensor]) -> None:
        self.group, self.count = group, len(params)
        self.state: dict[str, Any] = optimizer.state[params[0]]
        self.numbers = [number for number, p in enumerate(params) if p.grad is not None]
        self.params = [params[number] for number in self.numbers]
        self.grads = torch.stack([p.grad for p in self.params if p.grad is not None])

    def zeros(self, *shape: int) -> Tensor:
        """Zeros [count, *shape] for the state of all matrices, also of those that do not step."""
        return self.grads.new_zeros(self.count, *shape)

    def taken(self) -> dict[str, Tensor]:
        """The tensors of the state for the matrices that step: the state itself if all do, and copies otherwise."""
        tensors = {name: value for name, value in self.state.items() if isinstance(value, Tensor)}
        return tensors if self._all_step() else {name: value[self.numbers] for name, value in tensors.items()}

    def put_back(self, taken: dict[str, Tensor]) -> None:
        """Write what was taken, and has changed in place, into the state."""
        if not self._all_step():
            for name, value in taken.items():
                self.state[name][self.numbers] = value

    def _all_step(self) -> bool:
        return len(self.numbers) == self.count


def stacks_of(optimizer: Optimizer) -> list[Stack]:
    """The stacks of all groups in which some matrix has a gradient."""
    stacks = []
    for group in optimizer.param_groups:
        alike: dict[object, list[Tensor]] = {}
        for p in group["params"]:
            alike.setdefault((p.shape, p.dtype, p.device), []).append(p)
        moving = [params for params in alike.values() if any(p.grad is not None for p in params)]
        stacks += [Stack(optimizer, group, params) for params in moving]
    return stacks
