"""Parameters and gradients for tests of selective decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

LR, DECAY = 1e-2, 0.5
F64 = torch.float64


def parameters(dtype: torch.dtype = F64, shapes: tuple[tuple[int, ...], ...] = ((9, 6), (6, 6))) -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=F64).to(dtype)) for s in shapes]


def give_grads(params: list[Any], step: int) -> None:
    """Gradients of one step. The first three rows of the first parameter have none, as untouched embeddings."""
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=F64).to(p.dtype)
    params[0].grad[:3] = 0


def adamw(params: list[Tensor], weight_decay: float) -> Optimizer:
    return AdamW(params, lr=LR, weight_decay=weight_decay)
