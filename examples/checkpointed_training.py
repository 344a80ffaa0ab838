"""Training that can be killed at any moment and goes on bit for bit, because its checkpoints are whole or absent.

A second run with the same folder finds the end of the first. Copy `save`, `load` and `write_atomically`.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from selective import Eigenbasis, Magma, SelectiveUpdate

STEPS, EVERY = 60, 2


class Run:
    """The whole state of a run. Anything outside of it is not resumed."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        base = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.optimizer = SelectiveUpdate(base, policy=Magma(), preconditioner=Eigenbasis(refresh_every=3))
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        self.done = 0

    def step(self) -> None:
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(self.done))  # the data of step `done`
        self.optimizer.zero_grad()
        (self.model(x) - x.roll(1, 1)).square().mean().backward()
        self.optimizer.step()
        self.scheduler.step()
        self.done += 1

    def save(self, path: Path) -> None:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scheduler")}
        buffer = io.BytesIO()
        torch.save({**parts, "done": self.done, "random": torch.get_rng_state()}, buffer)
        write_atomically(path, buffer.getvalue())

    def load(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        for name in ("model", "optimizer", "scheduler"):
            getattr(self, name).load_state_dict(saved[name])
        torch.set_rng_state(saved["random"])  # for dropout and the like; policies don't use it
        self.done = saved["done"]


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that readers find the whole old file or the whole new one, even if the machine stops."""
    beside = path.with_name(path.name + ".tmp")  # on the same disk; overwrites the file of a killed run
    with open(beside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # the bytes reach the disk before the name does
    os.replace(beside, path)


def train(folder: Path) -> Run:
    path, run = folder / "checkpoint.pt", Run()
    if path.exists():
        run.load(path)
    while run.done < STEPS:
        run.step()
        if run.done % EVERY == 0 or run.done == STEPS:
            run.save(path)
    return run


if __name__ == "__main__":
    run = train(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
    print(f"{run.done} steps, learning rate {run.scheduler.get_last_lr()[0]:.1e}")
    print("ok")
