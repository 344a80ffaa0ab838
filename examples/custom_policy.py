"""A policy of your own: checked, used, compared with its random control, saved and loaded. Runs in seconds on a CPU."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from selective import Dense, MeanPreserving, Policy, RandomMask, Selection, SelectiveUpdate, StepView, policy_from
from selective.testing import check_policy


class Sticky(Policy):
    """A full step where update and gradient have mostly agreed in the last steps, `rest` elsewhere. It keeps state."""

    smoothing: float = Field(0.9, ge=0, lt=1)
    rest: float = Field(0.25, ge=0, le=1)

    def init_state(self, view: StepView) -> dict[str, Tensor]:
        return {"agreement": torch.zeros(view.shape, dtype=torch.float32, device=view.device)}

    def mask(self, view: StepView) -> tuple[Tensor, dict[str, Tensor]]:
        now = torch.sign(view.update * view.grad).float()
        agreement = torch.lerp(now, view.state["agreement"], self.smoothing)
        return torch.where(agreement > 0, 1.0, self.rest), {"agreement": agreement}


class LargeUpdates(Selection):
    """The largest updates of each tensor. A selection goes with every strength, and has a matched control."""

    fraction: float = Field(0.5, gt=0, le=1)
    reads: ClassVar[frozenset[str]] = frozenset({"update"})

    def select(self, view: StepView) -> Tensor:
        size = view.update.abs()
        return size >= view.quantile(size, 1.0 - self.fraction)


def final_loss(policy: Policy) -> float:
    """Train a small regression from a fixed start and return the mean loss of the last 20 steps."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    opt = SelectiveUpdate(torch.optim.AdamW(model.parameters(), lr=3e-3), policy=policy)
    losses = []
    for _ in range(200):
        x = torch.randn(64, 16, generator=generator)
        loss = nn.functional.mse_loss(model(x), torch.sin(x.sum(dim=1, keepdim=True)))
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


torch.set_num_threads(1)
check_policy(Sticky()).raise_if_failed()
assert policy_from(Sticky(rest=0.5).model_dump_json()) == Sticky(rest=0.5)

large = Policy(selection=LargeUpdates(), strength=MeanPreserving())
for policy in (Dense(), Sticky(), large, RandomMask.matching(large)):
    print(f"{final_loss(policy):.4f}  {policy!r}")
print("ok")
