"""MomentumBasis: AdamW in the basis of its first moment's singular vectors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from evidence.prototypes.stepper import with_gradients


class MomentumBasis(Optimizer):
    """AdamW whose second moment is of the gradient in a one-sided basis of matrices (Conda).

    The basis of the shorter side has the singular vectors of the first moment, and is made anew every `refresh_every`
    steps. The update is Q (m̂ / (√v̂ + ε)), where m and v are of Qᵀ g. A second moment follows a new basis by the squared
    map, which is ours: Conda keeps it as it is. No running Gram matrices are kept: state is m, v and Q.

    Raises:
        ValueError: a parameter is no matrix.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        refresh_every: int = 50,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "refresh_every": refresh_every}
        super().__init__(params, options)
        if any(p.dim() != 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("MomentumBasis: every parameter has to be a matrix")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is None
        for p, grad, group in with_gradients(self):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(self._update(grad, self.state[p], group), alpha=group["lr"])

    def _update(self, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Return the update, which is subtracted from the parameter times the rate. The moments move."""
        wide = grad.shape[0] <= grad.shape[1]
        grad = grad if wide else grad.T  # the basis is that of the rows
        if not state:
            state |= {"step": 0, "m": torch.zeros_like(grad), "v": torch.zeros_like(grad)}
        first, second = group["betas"]
        state["m"].lerp_(grad, 1 - first)
        if state["step"] % group["refresh_every"] == 0:
            self._refresh(state)
        state["step"] += 1
        basis = state["basis"]
        rotated = basis.T @ grad
        state["v"].mul_(second).addcmul_(rotated, rotated, value=1 - second)
        root = (state["v"] / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
        update = basis @ ((basis.T @ state["m"]) / root / (1 - first ** state["step"]))
        return update if wide else update.T

    def _refresh(self, state: dict[str, Any]) -> None:
        """Make the basis of the first moment, and carry the second moment into it."""
        m = state["m"] / max(float(state["m"].norm()), math.ulp(0.0))
        basis = torch.linalg.eigh(m @ m.T)[1]
        if "basis" in state:
            state["v"] = (state["basis"].T @ basis).square_().T @ state["v"]
        state["basis"] = basis
