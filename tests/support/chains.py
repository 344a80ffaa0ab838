"""Chains of optimizers over a small model, for tests of `ChainedOptimizer`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from selective import MGUP, ChainedOptimizer, SelectiveUpdate


def parts_of(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The matrices of a model, and the rest."""
    params = list(model.parameters())
    return [p for p in params if p.ndim == 2], [p for p in params if p.ndim != 2]


def muon_and_adamw(model: nn.Module, **options: Any) -> ChainedOptimizer:
    """Muon under MGUP for the matrices, a bare AdamW for the rest."""
    matrices, rest = parts_of(model)
    muon = SelectiveUpdate(torch.optim.Muon(matrices, lr=0.02), policy=MGUP(), **options)
    return ChainedOptimizer({"matrices": muon, "rest": torch.optim.AdamW(rest, lr=0.01)})


def two_adamw(model: nn.Module, policy: Any = "MGUP", rates: tuple[float, float] = (0.01, 0.01), **options: Any) -> Any:
    """AdamW twice, wrapped alike: for the matrices, and for the rest."""
    members = [
        SelectiveUpdate(torch.optim.AdamW(part, lr=rate), policy=policy, **options)
        for part, rate in zip(parts_of(model), rates, strict=True)
    ]
    return ChainedOptimizer(members)


def net(seed: int = 0) -> nn.Sequential:
    """A net of two matrices and two vectors. Leaves the global generator as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def give_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.device)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Step on the gradients of these steps."""
    for step in steps:
        give_gradients(model, step)
        optimizer.step()


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(first: Iterable[Tensor], second: Iterable[Tensor]) -> bool:
    """True if these are the same bits."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
