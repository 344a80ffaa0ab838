"""WhitenedMuon: Muon, whose momentum is divided by the root of its second moment in Soap's basis before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from evidence.prototypes.orthogonal import nesterov, orthogonalised, subtract
from evidence.prototypes.stepper import with_gradients

DECAY_OF_SQUARES = 0.9


class WhitenedMuon(Optimizer):
    """Muon over matrices, with a whitening before the orthogonalisation.

        P = QLᵀ u QR;  v = 0.9 v + 0.1 P²;  s = QL (P / √v) QRᵀ;  W -= lr · NewtonSchulz(s)

    u is Nesterov's momentum. QL and QR are the eigenbases of running Gram matrices, one of each side. They follow them
    by a power step and a QR every `refresh_every` steps. Decay, scale and momentum are those of torch's Muon. It is
    the rule of a public run of GPT-2 124M.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        beta: float = 0.95,
        refresh_every: int = 10,
        eps: float = 1e-8,
    ) -> None:
        options = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "beta": beta, "eps": eps}
        super().__init__(params, {**options, "refresh_every": refresh_every})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is None
        for p, grad, group in with_gradients(self):
            subtract(p, orthogonalised(self._whitened(grad, self.state[p], group)), group)

    def _whitened(self, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Nesterov's momentum, whitened. All averages move."""
        grams = {"left": grad @ grad.T, "right": grad.T @ grad}
        if not state:
            state |= {"step": 0, "m": torch.zeros_like(grad), "v": torch.zeros_like(grad)}
            state |= {side: torch.zeros_like(gram) for side, gram in grams.items()}
        for side, gram in grams.items():
            state[side].lerp_(gram, 1 - group["beta"])
            basis = f"basis of {side}"
            if state["step"] == 0:
                state[basis] = torch.linalg.eigh(state[side])[1]
            elif state["step"] % group["refresh_every"] == 0:
                state[basis] = torch.linalg.qr(state[side] @ state[basis])[0]
        state["step"] += 1
        update = nesterov(grad, state["m"], group["momentum"])
        left, right = state["basis of left"], state["basis of right"]
        rotated = left.T @ update @ right
        state["v"].mul_(DECAY_OF_SQUARES).addcmul_(rotated, rotated, value=1 - DECAY_OF_SQUARES)
        return left @ (rotated / state["v"].sqrt().add_(group["eps"])) @ right.T
