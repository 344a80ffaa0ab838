"""A task of your own in 30 lines: does selection help this regression?

The same on the command line:

    selective compare --task examples/task_regression.py:Regression --policy Cautious --lr 3e-3,1e-2 --steps 60
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from selective import MGUP, Cautious
from selective.compare import compare


class Regression:
    """Learn a noisy function of eight numbers."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(512, 8, generator=generator)
        noise = 0.1 * torch.randn(512, 1, generator=generator)
        self.targets = (self.inputs[:, :1] * self.inputs[:, 1:2]).sin() + noise

    def model(self, seed: int) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(448, generator=torch.Generator().manual_seed(seed)).split(32):
            yield self.inputs[rows], self.targets[rows]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(model(inputs), targets)

    def evaluate(self, model: nn.Module) -> float:
        return self.loss(model, (self.inputs[448:], self.targets[448:])).item()


if __name__ == "__main__":
    comparison = compare(
        Regression(), [Cautious(), MGUP()], lrs=[3e-3, 1e-2], seeds=2, steps=20, out="regression", show=False
    )
    for label, verdict in comparison.summary.verdicts:
        print(f"{label}: {verdict}")
    print("ok")
