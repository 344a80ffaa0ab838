"""Groups with different policies, a scheduler, clipping, a checkpoint and an exact resume. Seconds on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from selective import MGUP, SelectiveUpdate

STEPS, HALF = 60, 30


def build() -> tuple[nn.Module, SelectiveUpdate, Any]:
    """Model, optimizer, scheduler. Matrices have decay and MGUP, vectors neither, the embedding a gentler MGUP."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(32, 16), nn.Flatten(), nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 32))
    named = dict(model.named_parameters())
    table = {"0.weight": named.pop("0.weight")}
    matrices = {name: p for name, p in named.items() if p.ndim >= 2}
    vectors = {name: p for name, p in named.items() if p.ndim < 2}
    groups = [
        {"params": list(matrices.items()), "weight_decay": 0.1, "policy": MGUP(alpha=1.5, gamma=0.5)},
        {"params": list(vectors.items()), "weight_decay": 0.0, "policy": None},  # None: dense
        {"params": list(table.items()), "weight_decay": 0.0},  # the wrapper's own policy
    ]
    opt = SelectiveUpdate(torch.optim.AdamW(groups, lr=3e-3), policy=MGUP(alpha=1.2, gamma=0.8))
    return model, opt, torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS)


def train(model: nn.Module, opt: SelectiveUpdate, schedule: Any, first: int, last: int) -> float:
    """The usual training loop. The task is to find the largest of four numbers."""
    value = 0.0
    for step in range(first, last):
        x = torch.randint(32, (128, 4), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(x), x.amax(dim=1))
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        schedule.step()
        value = loss.item()
    return value


torch.set_num_threads(1)
model, opt, schedule = build()
print(opt.explain())
train(model, opt, schedule, 0, HALF)
torch.save({"model": model.state_dict(), "opt": opt.state_dict(), "schedule": schedule.state_dict()}, "half.pt")
print(f"loss after {STEPS} steps: {train(model, opt, schedule, HALF, STEPS):.3f}")
print("selected in the last step:", {name: f"{s['share']:.2f}" for name, s in opt.statistics().items()})

resumed, opt_2, schedule_2 = build()
saved = torch.load(Path("half.pt"), weights_only=True)
resumed.load_state_dict(saved["model"])
opt_2.load_state_dict(saved["opt"])
schedule_2.load_state_dict(saved["schedule"])
train(resumed, opt_2, schedule_2, HALF, STEPS)
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
print("the resumed run ends bit for bit where the first one did: ok")
