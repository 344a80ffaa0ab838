"""MaskedMuon: Muon with a cautious mask in places where a policy can't put it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from evidence.prototypes.orthogonal import nesterov, orthogonalise_, subtract
from evidence.prototypes.stacks import Stack, stacks_of

LEAST = 0.1  # of the mean of a mask, by which the rest is scaled up


class MaskedMuon(Optimizer):
    """Muon over matrices, with a mask by the agreement of momentum and gradient.

    With `where="before"` coordinates of Nesterov's momentum u with u · g <= 0 are zeroed before the orthogonalisation,
    so that a masked step is orthogonal, too. With `where="rows"` whole rows of the orthogonal update o are zeroed where
    the sum of o · g over the row is not positive, and the others are divided by their share.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        where: Literal["before", "rows"] = "before",
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "where": where})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is None
        stacks = stacks_of(self)
        updates = [_update(stack) for stack in stacks]
        orthogonalise_(updates)
        for stack, update in zip(stacks, updates, strict=True):
            subtract(stack, _masked_rows(update, stack.grads) if stack.group["where"] == "rows" else update)


def _update(stack: Stack) -> Tensor:
    """The update before it is orthogonalised. The momentum moves."""
    if not stack.state:
        stack.state["m"] = stack.zeros(*stack.grads.shape[1:])
    taken = stack.taken()
    update = nesterov(stack.grads, taken["m"], stack.group["momentum"])
    stack.put_back(taken)
    return update.mul_(update * stack.grads > 0) if stack.group["where"] == "before" else update


def _masked_rows(update: Tensor, grads: Tensor) -> Tensor:
    """The orthogonal updates with a mask of each one's rows."""
    agree = ((update * grads).sum(2, keepdim=True) > 0).to(update.dtype)
    return update * agree / agree.mean(1, keepdim=True).clamp(min=LEAST)
