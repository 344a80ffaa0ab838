"""MaskedMuon: Muon with a cautious mask in places where a policy can't put it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from evidence.prototypes.orthogonal import nesterov, orthogonalised, subtract
from evidence.prototypes.stepper import with_gradients

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
        for p, grad, group in with_gradients(self):
            subtract(p, self._masked(grad, self.state[p], group), group)

    def _masked(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        """The orthogonal update with its mask. The momentum moves."""
        if not state:
            state["m"] = torch.zeros_like(grad)
        update = nesterov(grad, state["m"], group["momentum"])
        if group["where"] == "before":
            return orthogonalised(update * (update * grad > 0))
        update = orthogonalised(update)
        agree = ((update * grad).sum(1, keepdim=True) > 0).to(update.dtype)
        return update * agree / agree.mean().clamp(min=LEAST)
