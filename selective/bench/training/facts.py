"""Facts about an optimizer that are no times: the ways in which it gets its updates, and the bytes of its state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective import ChainedOptimizer, SelectiveUpdate


def ways_of(optimizer: Optimizer) -> list[str]:
    """The captures of our optimizers' groups, each named once; [] of other people's."""
    members = optimizer.members if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    ours = [member for member in members if isinstance(member, SelectiveUpdate)]
    return list(dict.fromkeys(plan.capture.way for member in ours for plan in member.groups.plans))


def state_bytes(optimizer: Optimizer) -> int:
    """The bytes of the tensors on the parameters' device in an optimizer's state, lists and dictionaries included."""

    def size(value: Any, device: torch.device) -> int:
        if isinstance(value, Tensor):
            return value.nbytes if value.device == device else 0
        if isinstance(value, dict):
            return sum(size(each, device) for each in value.values())
        return sum(size(each, device) for each in value) if isinstance(value, (list, tuple)) else 0

    params = [p for group in optimizer.param_groups for p in group["params"]]
    return sum(size(dict(optimizer.state.get(p, {})), p.device) for p in params)
