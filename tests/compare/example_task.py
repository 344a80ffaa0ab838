"""A small task, and functions that make optimizers. Tests load this file by its path, as users load theirs."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

INPUTS = torch.randn(24, 3, generator=torch.Generator().manual_seed(5))
TARGETS = INPUTS[:, :2].tanh()


class Line:
    """Regression with dropout, in batches of an epoch that is shuffled by the seed. It draws global numbers."""

    def model(self, seed: int) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.25), nn.Linear(4, 2))

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(24).split(6):
            yield INPUTS[rows] + 0.01 * torch.randn(6, 3), TARGETS[rows]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module) -> float:
        assert not model.training
        assert not torch.is_grad_enabled()
        device = next(model.parameters()).device
        return nn.functional.mse_loss(model(INPUTS.to(device)), TARGETS.to(device)).item()


class Deadly(Line):
    """Kills a worker's process at the second seed, as the system does that lacks memory."""

    def model(self, seed: int) -> nn.Module:
        if seed == 1 and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().model(seed)


def of_params(params: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def of_model(model: nn.Module, lr: float, rest_lr: float, seed: int) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.Adam([{"params": matrices, "lr": lr}, {"params": vectors, "lr": rest_lr}], lr=lr)


def deaf(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """A function that the second learning rate does not reach."""
    return torch.optim.Adam(model.parameters(), lr=lr)


not_callable = 3
