"""Base optimizers transcribed in float64 from their papers and torch's documentation, one tensor at a time.

Nothing of the library is imported here, because the library is tested against these. `size` of a move is the formula of
the update with every term taken positive. Rounding errors are relative to it, and not to the sum, which may cancel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

F64 = torch.float64


@dataclass
class Move:
    """The step of one tensor before any mask: p <- factor p - mask * update."""

    grad: Tensor  # as the base sees it, after coupled decay
    grad_size: Tensor
    update: Tensor
    size: Tensor
    momentum: Tensor  # after this gradient was mixed in
    momentum_size: Tensor
    previous: Tensor  # before this gradient was mixed in
    nesterov: Tensor  # the momentum one step ahead, up to a positive factor
    factor: float
    margin: float = math.inf  # distance of the rule's own decisions (signs) from their border, relative to rounding


class Base:
    """The state of one tensor. `advance` takes a gradient; `load` takes the state of a torch optimizer."""

    names: Mapping[str, str] = {}  # torch's state key -> ours

    def __init__(self) -> None:
        self.t = 0

    def advance(self, p: Tensor, g: Tensor) -> Move:
        raise NotImplementedError

    def load(self, state: Mapping[str, Tensor], t: int) -> None:
        self.t = t
        for theirs, ours in self.names.items():
            if state.get(theirs) is not None:
                setattr(self, ours, state[theirs].detach().to(F64).clone())


class AdamW(Base):
    """arXiv 1711.05101 as in torch: bias-corrected moments, eps added outside of the root, after the correction."""

    names = {"exp_avg": "m", "exp_avg_sq": "v"}

    def __init__(
        self, lr: float = 1e-2, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, decay: float = 0.1
    ) -> None:
        super().__init__()
        self.lr, self.beta1, self.beta2, self.eps, self.decay = lr, beta1, beta2, eps, decay
        self.m: Tensor | None = None
        self.v: Tensor | None = None

    def advance(self, p: Tensor, g: Tensor) -> Move:
        self.t += 1
        b1, b2 = self.beta1, self.beta2
        before = torch.zeros_like(p) if self.m is None else self.m
        square = torch.zeros_like(p) if self.v is None else self.v
        self.m, self.v = b1 * before + (1 - b1) * g, b2 * square + (1 - b2) * g * g
        scale = self.lr / (1 - b1**self.t) / ((self.v / (1 - b2**self.t)).sqrt() + self.eps)
        size = b1 * before.abs() + (1 - b1) * g.abs()
        ahead = b1 * self.m + (1 - b1) * g
        return Move(g, g.abs(), scale * self.m, scale * size, self.m, size, before, ahead, 1 - self.lr * self.decay)


class SGD(Base):
    """torch's SGD with momentum: the buffer is a sum that starts as the first gradient, and decay is coupled."""

    names = {"momentum_buffer": "m"}

    def __init__(self, lr: float = 0.1, mu: float = 0.9, nesterov: bool = False, decay: float = 0.05):
        super().__init__()
        self.lr, self.mu, self.nesterov, self.decay = lr, mu, nesterov, decay
        self.m: Tensor | None = None

    def advance(self, p: Tensor, g: Tensor) -> Move:
        self.t += 1
        size = g.abs() + self.decay * p.abs()
        g = g + self.decay * p
        before = torch.zeros_like(p) if self.m is None else self.m
        self.m = self.mu * before + g
        sizes = self.mu * before.abs() + size
        ahead = g + self.mu * self.m
        u, s = (ahead, size + self.mu * sizes) if self.nesterov else (self.m, sizes)
        return Move(g, size, self.lr * u, self.lr * s, self.m, sizes, before, ahead, 1.0)


class Lion(Base):
    """arXiv 2302.06675: the step is the sign of one interpolation, and another one is kept."""

    names = {"exp_avg": "m"}

    def __init__(self, lr: float = 1e-2, beta1: float = 0.9, beta2: float = 0.99, decay: float = 0.1) -> None:
        super().__init__()
        self.lr, self.beta1, self.beta2, self.decay = lr, beta1, beta2, decay
        self.m: Tensor | None = None

    def advance(self, p: Tensor, g: Tensor) -> Move:
        self.t += 1
        before = torch.zeros_like(p) if self.m is None else self.m
        c = self.beta1 * before + (1 - self.beta1) * g
        size = self.beta1 * before.abs() + (1 - self.beta1) * g.abs()
        self.m = self.beta2 * before + (1 - self.beta2) * g
        kept = self.beta2 * before.abs() + (1 - self.beta2) * g.abs()
        u = self.lr * c.sign()
        ahead = self.beta2 * self.m + (1 - self.beta2) * g  # its momentum moves with beta2
        margin = float((c.abs() / size).min())
        return Move(g, g.abs(), u, u.abs(), self.m, kept, before, ahead, 1 - self.lr * self.decay, margin)


def torchs_newton_schulz(matrix: Tensor) -> Tensor:
    """torch's own, with the coefficients that are Muon's default."""
    return _zeropower_via_newtonschulz(matrix, (3.4445, -4.775, 2.0315), 5, 1e-7)


class Muon(Base):
    """torch.optim.Muon: Nesterov momentum (a running average), orthogonalised, scaled by sqrt(max(1, rows/columns)).

    The Newton-Schulz iteration runs in bfloat16 and amplifies its rounding. So the function that is compared with is
    used, on an input computed as torch computes it in the parameter's dtype. All the rest is written out.
    """

    names = {"momentum_buffer": "m"}

    def __init__(
        self,
        lr: float = 1e-2,
        mu: float = 0.95,
        decay: float = 0.1,
        dtype: torch.dtype = F64,
        orthogonalize: Callable[[Tensor], Tensor] = torchs_newton_schulz,
    ) -> None:
        super().__init__()
        self.lr, self.mu, self.decay, self.dtype, self.orthogonalize = lr, mu, decay, dtype, orthogonalize
        self.m: Tensor | None = None

    def advance(self, p: Tensor, g: Tensor) -> Move:
        self.t += 1
        before = torch.zeros_like(p) if self.m is None else self.m
        low = g.to(self.dtype)
        their_input = low.lerp(before.to(self.dtype).lerp(low, 1 - self.mu), self.mu)
        direction = self.orthogonalize(their_input).to(F64)
        self.m = self.mu * before + (1 - self.mu) * g
        size = self.mu * before.abs() + (1 - self.mu) * g.abs()
        u = self.lr * math.sqrt(max(1.0, p.shape[0] / p.shape[1])) * direction
        ahead = self.mu * self.m + (1 - self.mu) * g
        return Move(g, g.abs(), u, u.abs(), self.m, size, before, ahead, 1 - self.lr * self.decay)
