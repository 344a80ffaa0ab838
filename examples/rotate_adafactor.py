"""Adafactor with and without a rotation, on a problem whose rows are entangled: a small net behind a mixing of inputs.

AdaDiag rotates the gradient of each hidden matrix into singular vectors on its smaller side, Adafactor keeps its
factored moments in that space, and its update is rotated back. Nothing else in the loop changes.
"""

from __future__ import annotations

import torch
from torch import nn

from selective import AdaDiag, Preconditioner, SelectiveUpdate, param_groups_for

STEPS, BATCH, WIDTH = 200, 64, 32


def problem(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs whose covariance is far from diagonal, and targets from a fixed net."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator) * torch.logspace(0, -1.5, WIDTH)
    x = torch.randn(2048, WIDTH, generator=generator) @ mixing
    teacher = torch.randn(WIDTH, 1, generator=generator)
    return x, torch.tanh(x @ teacher / WIDTH**0.5)


def train(preconditioner: Preconditioner | None, lr: float, seed: int = 0) -> float:
    """The mean squared error over the last 20 of 200 steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    x, y = problem(seed)
    base = torch.optim.Adafactor(param_groups_for(model, weight_decay=0.0), lr=lr)
    opt = SelectiveUpdate(base, preconditioner=preconditioner)
    losses = []
    for step in range(STEPS):
        rows = torch.arange(step * BATCH, (step + 1) * BATCH) % len(x)
        loss = (model(x[rows]) - y[rows]).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


if __name__ == "__main__":
    rates = (1e-2, 3e-2, 1e-1)
    spaces = {"Adafactor": None, "in AdaDiag(one side)": AdaDiag(sides="one", refresh_every=20)}
    for name, space in spaces.items():
        print(f"{name:22}", "  ".join(f"lr {lr:g}: {train(space, lr):.4f}" for lr in rates))
    print("ok")
