"""SOAP and AdaDiag transcribed in float64 from their formulas. Nothing of the library is imported here.

Both are for one matrix W and its gradients G. Adam's moments live in the current rotated space.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

F64 = torch.float64


def falling(gram: Tensor) -> Tensor:
    """Eigenvectors, the largest eigenvalue first."""
    return torch.linalg.eigh(gram)[1].flip(-1)


@dataclass
class SoapRule:
    """arXiv 2409.11321, algorithm 3 with the practice of its section 4: β = 0.95, every f steps, sorted columns.

    Step 0: L ← (1 − β) G Gᵀ, R ← (1 − β) Gᵀ G, Q their eigenvectors; nothing moves.
    Step t: M ← β₁ M + (1 − β₁) G, kept unrotated; V ← β₂ V + (1 − β₂) (QₗᵀG Qᵣ)²; W ← W − η Qₗ (M̂'/(√V̂ + ε)) Qᵣᵀ with
    M' = QₗᵀM Qᵣ; L ← β L + (1 − β) G Gᵀ and R alike; if f divides t: sort Q's columns and V along by diag(QᵀLQ), then
    Q ← qr(L Q).

    `squared`: V not sorted along, but V ← (Q'ᵀQ)∘² V (QᵀQ')∘², and where that is below M'²/c², V ← M'²/c², with
    c² = (1 − β₁)²/(1 − β₂) / (1 − β₁²/β₂).
    """

    weights: Tensor
    rate: float
    every: int = 10
    beta: float = 0.95
    betas: tuple[float, float] = (0.95, 0.95)
    eps: float = 1e-8
    squared: bool = False
    time: int = 0
    grams: list[Tensor] = field(default_factory=list)  # L, R
    bases: list[Tensor] = field(default_factory=list)
    m: Tensor = field(default_factory=lambda: torch.zeros(()))
    v: Tensor = field(default_factory=lambda: torch.zeros(()))

    def step(self, grad: Tensor) -> None:
        grad = grad.to(F64)
        products = [grad @ grad.mT, grad.mT @ grad]
        if self.time == 0:
            self.grams = [(1 - self.beta) * product for product in products]
            self.bases = [falling(gram) for gram in self.grams]
            self.m, self.v = torch.zeros_like(grad), torch.zeros_like(grad)
        else:
            self._move(grad)
            self.grams = [self.beta * a + (1 - self.beta) * b for a, b in zip(self.grams, products, strict=True)]
            if self.time % self.every == 0:
                self._refresh()
        self.time += 1

    def _move(self, grad: Tensor) -> None:
        (left, right), (b1, b2) = self.bases, self.betas
        self.m = b1 * self.m + (1 - b1) * grad
        self.v = b2 * self.v + (1 - b2) * (left.mT @ grad @ right) ** 2
        mean, variance = left.mT @ self.m @ right / (1 - b1**self.time), self.v / (1 - b2**self.time)
        self.weights = self.weights - self.rate * left @ (mean / (variance.sqrt() + self.eps)) @ right.mT

    def _refresh(self) -> None:
        for side, (gram, basis) in enumerate(zip(self.grams, self.bases, strict=True)):
            order = (basis.mT @ gram @ basis).diagonal().argsort(descending=True)
            self.bases[side] = torch.linalg.qr(gram @ basis[:, order]).Q
            if self.squared:
                turn = (self.bases[side].mT @ basis) ** 2
                self.v = turn @ self.v if side == 0 else self.v @ turn.mT
            else:
                self.v = self.v[order] if side == 0 else self.v[:, order]
        if self.squared:
            b1, b2 = self.betas
            mean, (left, right) = self.m, self.bases
            limit = (1 - b1) ** 2 / (1 - b2) / (1 - b1**2 / b2)
            self.v = torch.maximum(self.v, (left.mT @ mean @ right) ** 2 / limit)


@dataclass
class AdaDiagRule:
    """arXiv 2502.07488 as others restate it: G = P Σ Qᵀ every T steps, Adam on PᵀG or PᵀGQ, moments kept as they are.

    The signs of singular vectors are arbitrary, and moments that are kept depend on them. So the vectors are handed in
    (`bases`: P, and Q or None), and are checked to diagonalise G.
    """

    weights: Tensor
    rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    time: int = 0
    m: Tensor = field(default_factory=lambda: torch.zeros(()))
    v: Tensor = field(default_factory=lambda: torch.zeros(()))

    def step(self, grad: Tensor, p: Tensor, q: Tensor | None, floor: float = 0.0) -> None:
        """Take a step. `floor` is not the paper's: rotated elements below it are left out."""
        p, grad = p.to(F64), grad.to(F64)
        rotated = p.mT @ grad
        rotated = rotated if q is None else rotated @ q.to(F64)
        rotated = torch.where(rotated.abs() < floor, 0.0, rotated)
        self.time += 1
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * rotated
        self.v = b2 * self.v + (1 - b2) * rotated**2
        update = self.m / (1 - b1**self.time) / ((self.v / (1 - b2**self.time)).sqrt() + self.eps)
        update = p @ update
        self.weights = self.weights - self.rate * (update if q is None else update @ q.to(F64).mT)

    @staticmethod
    def is_of(grad: Tensor, p: Tensor, q: Tensor | None) -> float:
        """The distance of these from the singular vectors of G: off-diagonal elements over the largest value."""
        grad = grad.to(F64)
        sigma = torch.linalg.svdvals(grad)
        found = p.to(F64).mT @ grad
        found = found @ found.mT / sigma[0] if q is None else found @ q.to(F64)
        values = sigma**2 / sigma[0] if q is None else sigma
        diagonal = found.diagonal().clone()
        off = found.fill_diagonal_(0)
        return float(torch.maximum(off.abs().max(), (diagonal.abs() - values[: len(diagonal)]).abs().max()) / sigma[0])
