"""accelerate: `prepare`, gradient accumulation, clipping, `save_state`, and an exact resume. Seconds on a CPU.

The data are real: predict the next character of a module of Python's standard library from the eight before it.
"""

from __future__ import annotations

import inspect
import tempfile
import textwrap
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from selective import MGUP, SelectiveUpdate, Soap

STEPS, BATCH, CONTEXT = 60, 64, 8  # steps in an epoch, with two batches each


def characters() -> TensorDataset:
    """Windows of the text, shuffled once."""
    text = torch.tensor([min(ord(c), 127) for c in inspect.getsource(textwrap)])
    windows = text.unfold(0, CONTEXT + 1, 1)
    mixed = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    windows = windows[mixed[: 2 * STEPS * BATCH]]
    return TensorDataset(windows[:, :-1], windows[:, -1])


def build(accelerator: Accelerator) -> tuple[Any, ...]:
    """Prepared model, optimizer, loader and schedule. Only the line that makes the optimizer knows of `selective`."""
    set_seed(0)
    model = nn.Sequential(nn.Embedding(128, 16), nn.Flatten(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 128))
    base = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    optimizer = SelectiveUpdate(base, policy=MGUP(alpha=1.5, gamma=0.5), preconditioner=Soap())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * STEPS)
    return accelerator.prepare(model, optimizer, DataLoader(characters(), batch_size=BATCH), schedule)


def train_epoch(accelerator: Accelerator, parts: tuple[Any, ...]) -> float:
    """Train one epoch. Returns its mean loss."""
    model, optimizer, loader, schedule = parts
    losses = []
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses) / len(losses)


torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    parts = build(accelerator)
    print(f"mean loss of the first epoch:  {train_epoch(accelerator, parts):.3f}")
    accelerator.save_state(folder)
    print(f"mean loss of the second epoch: {train_epoch(accelerator, parts):.3f}")

    accelerator.free_memory()  # as if the process had been killed
    resumed = build(accelerator)
    accelerator.load_state(folder)
    train_epoch(accelerator, resumed)
assert all(torch.equal(p, q) for p, q in zip(parts[0].parameters(), resumed[0].parameters(), strict=True))
print("the resumed run ends bit for bit where the first one did: ok")
