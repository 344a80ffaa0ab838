"""Small regressions whose gradients are sparse, each in another way, as trials for rotations and moments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("one-hot", "bags", "dead rows and columns", "masked blocks", "rank one")
OUT, IN, BATCH = 6, 16, 4
NOISE = 0.2  # in the targets; without it losses fall to arbitrary powers of 10, and their ratio says nothing


@dataclass
class Outcome:
    """The largest change of a weight in one step, and the loss at the end: the mean of the last 20 steps."""

    jump: float
    loss: float


def batch(kind: str, step: int, seed: int) -> tuple[Tensor, Tensor]:
    """The inputs [BATCH, IN] of one step, and the outputs that count [OUT]."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    counts = torch.ones(OUT)
    if kind == "one-hot":
        x = torch.nn.functional.one_hot(torch.randint(IN, (BATCH,), generator=generator), IN).float()
    elif kind == "bags":
        x = (torch.rand(BATCH, IN, generator=generator) < 0.15).float()
    elif kind == "dead rows and columns":
        x = torch.randn(BATCH, IN, generator=generator)
        x[:, ::3] = 0.0
        counts[1::2] = 0.0
    elif kind == "masked blocks":  # one expert after the other, and a stretch of its inputs
        x = torch.zeros(BATCH, IN)
        turn = int(torch.randint(3, (), generator=generator))
        x[:, 5 * turn : 5 * turn + 6] = torch.randn(BATCH, 6, generator=generator)
        counts = torch.zeros(OUT)
        counts[2 * turn : 2 * turn + 2] = 1.0
    else:
        x = torch.randn(1, IN, generator=generator)
    return x, counts


def train(
    kind: str, make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], steps: int, seed: int
) -> Outcome:
    """Train one weight [OUT, IN] to a linear map that it can reach."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.nn.Parameter(0.1 * torch.randn(OUT, IN, generator=generator))
    wanted = torch.randn(OUT, IN, generator=generator)
    optimizer = make([weight])
    jump, losses = 0.0, []
    for step in range(steps):
        x, counts = batch(kind, step, seed)
        noise = NOISE * torch.randn(len(x), OUT, generator=generator)
        loss = ((x @ (weight - wanted).mT + noise).square() * counts).mean()
        optimizer.zero_grad()
        loss.backward()
        before = weight.detach().clone()
        optimizer.step()
        jump = max(jump, float((weight.detach() - before).abs().max()))
        losses.append(float(loss.detach()))
    return Outcome(jump, sum(losses[-20:]) / 20)
