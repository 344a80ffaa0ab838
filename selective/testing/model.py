"""The small model that the conformance suite trains, with every kind of parameter that has tripped up a wrapper."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

LATE = 5  # the first step at which `late` gets a gradient


class ConformanceModel(nn.Module):
    """A few parameters of different kinds; `loss(step)` is deterministic and touches no global generator.

    `square` has 4,096 elements because 8-bit optimizers keep smaller tensors exact. With `late=False` every trainable
    parameter gets a gradient in every step.
    """

    def __init__(
        self,
        kind: Literal["mixed", "matrices"] = "mixed",
        dtype: torch.dtype = torch.float32,
        late: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.kind, self.wait = kind, late
        generator = torch.Generator().manual_seed(seed)

        def parameter(*shape: int, scale: float = 0.3) -> nn.Parameter:
            return nn.Parameter((torch.randn(shape, generator=generator) * scale).to(dtype))

        mixed = kind == "mixed"
        self.embedding = parameter(13, 8, scale=1.0)
        self.convolution = parameter(8, 8, 3) if mixed else None
        self.up = parameter(64, 8)
        self.square = parameter(64, 64, scale=0.1)
        self.vector = parameter(64) if mixed else None
        self.one = parameter(1) if mixed else parameter(1, 1)
        self.late = parameter(64) if mixed else parameter(64, 8)
        self.frozen = parameter(8, 8).requires_grad_(False)

    def loss(self, step: int) -> Tensor:
        """The loss of batch `step`: a 0-d tensor of the parameters' dtype."""
        generator = torch.Generator().manual_seed(1_000 + step)
        tokens = torch.randint(0, 13, (6,), generator=generator)
        target = torch.randn(6, 64, generator=generator).to(self.up.dtype)
        h = self.embedding[tokens] @ self.frozen  # (6, 8)
        if self.convolution is not None:
            h = h + nn.functional.conv1d(h.T[None], self.convolution, padding=1)[0].T
        up = self.up
        if self.late.ndim == 2 and (step >= LATE or not self.wait):
            up = up + self.late
        h = torch.tanh(h @ up.T) @ self.square
        if self.vector is not None:
            h = h + self.vector
        if self.late.ndim == 1 and (step >= LATE or not self.wait):
            h = h * (1 + self.late)
        return ((h * (1 + self.one.sum()) - target) ** 2).mean()

    def forward(self, step: int | Tensor) -> Tensor:
        """`loss` for trainers, which call a model with a batch. Here the batch is its number, alone or in a tensor."""
        return self.loss(int(step))
