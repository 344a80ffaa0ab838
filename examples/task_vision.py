"""A vision model: a small convolutional network tells bars from crosses and rings, in images made on the spot.

AdamW is compared with MGUP on it, and with an optimizer that a function makes. Two learning rates are swept in pairs:
one of the weights, and one of biases and norms.

    selective compare --task examples/task_vision.py:Shapes --optimizer examples/task_vision.py:sgd --policy MGUP
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from selective import MGUP
from selective.compare import compare

SIZE = 12  # pixels on a side
KINDS = 3


class Shapes:
    """Classify 12 x 12 images. Evaluation is the error rate on images that are not trained on."""

    name = "a small ConvNet on shapes"
    unit = "error rate"

    def model(self, seed: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(), nn.Linear(64, KINDS),
        )  # fmt: skip

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """A batch that depends on its step alone, so that a resumed run has nothing to draw again."""
        return images(64, seed * 100_003 + step)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        pixels, kinds = batch
        return nn.functional.cross_entropy(model(pixels), kinds)

    def evaluate(self, model: nn.Module) -> float:
        pixels, kinds = images(256, -1)
        device = next(model.parameters()).device
        return (model(pixels.to(device)).argmax(1) != kinds.to(device)).float().mean().item()


def images(count: int, number: int) -> tuple[Tensor, Tensor]:
    """Noisy images, float32 (count, 1, 12, 12), and their kinds: bars, crosses, rings, at random places."""
    generator = torch.Generator().manual_seed(number + 2**32)
    kinds = torch.randint(0, KINDS, (count,), generator=generator)
    centre = torch.randint(3, SIZE - 3, (2, count, 1, 1), generator=generator)
    y, x = (torch.arange(SIZE).view(shape) - c for shape, c in zip(((1, SIZE, 1), (1, 1, SIZE)), centre, strict=True))
    bars = (y == 0) & (x.abs() <= 3)
    crosses = bars | ((x == 0) & (y.abs() <= 3))
    rings = (x.abs().maximum(y.abs()) == 2).expand_as(bars)
    drawn = torch.stack([bars, crosses, rings])[kinds, torch.arange(count)]
    noise = 0.4 * torch.randn(count, SIZE, SIZE, generator=generator)
    return (drawn + noise).unsqueeze(1), kinds


def sgd(params: Any, lr: float) -> torch.optim.Optimizer:
    """SGD with momentum at ten times the rate: a function like this makes any optimizer a contender."""
    return torch.optim.SGD(
        [{**group, "lr": 10 * group.get("lr", lr)} for group in params], lr=10 * lr, momentum=0.9, nesterov=True
    )


if __name__ == "__main__":
    comparison = compare(
        Shapes(), [MGUP(), sgd], lrs=[3e-3, 1e-2], rest_lrs=[3e-3, 1e-2], seeds=2, steps=10, controls=False,
        out="vision", show=False,
    )  # fmt: skip
    for row in comparison.summary.rows:
        if row.best and row.loss is not None:
            print(f"{row.contender.label}: error rate {row.loss}, at the rates {row.lr:g} and {row.rest_lr:g}")
    print("ok")
