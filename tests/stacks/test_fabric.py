"""Lightning Fabric: `fabric.setup(model, optimizer)` hands out an object that stands in for the optimizer."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from selective import MGUP, Eigenbasis, SelectiveUpdate
from selective.state.entries import STEP

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # lightning looks for pkg_resources
    fabric_package: Any = pytest.importorskip("lightning.fabric")


@dataclass
class Run:
    """One Fabric with what it hands out, and the optimizer behind it."""

    fabric: Any
    model: Any
    wrapped: Any
    optimizer: SelectiveUpdate

    def step(self, number: int) -> None:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(number))
        self.fabric.backward(self.model(x).square().sum())
        self.wrapped.step()
        self.wrapped.zero_grad()

    def counts(self) -> set[int]:
        """The step counts that are read, by each way there is."""
        params = self.optimizer.param_groups[0]["params"]
        found = [int(one.state[p][STEP]) for one in (self.wrapped, self.optimizer) for p in params]
        return {*found, *(int(entries[STEP]) for entries in self.wrapped.state_dict()["state"].values())}


def setup() -> Run:
    fabric = fabric_package.Fabric(accelerator="cpu", devices=1)
    model: Any = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    for seed, p in enumerate(model.parameters()):
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    base = torch.optim.AdamW(model.parameters(), lr=0.1)
    optimizer = SelectiveUpdate(base, policy=MGUP(), preconditioner=Eigenbasis(refresh_every=2))
    model, wrapped = fabric.setup(model, optimizer)
    return Run(fabric, model, wrapped, optimizer)


def test_the_state_counts_its_steps() -> None:
    run = setup()
    for number in range(4):
        run.step(number)
        assert run.counts() == {number + 1}
        assert run.wrapped.statistics().keys() == run.optimizer.statistics().keys()
        assert run.wrapped.explain() == run.optimizer.explain()


def test_saved_and_loaded_by_fabric(tmp_path: Path) -> None:
    """The run goes on as one that was not interrupted, and counts on."""
    run, resumed = setup(), setup()
    for number in range(3):
        run.step(number)
    run.fabric.save(tmp_path / "saved.ckpt", {"model": run.model, "optimizer": run.wrapped})
    resumed.fabric.load(tmp_path / "saved.ckpt", {"model": resumed.model, "optimizer": resumed.wrapped})
    assert resumed.counts() == {3}
    for one in (run, resumed):
        one.step(3)
        assert one.counts() == {4}
    for p, q in zip(run.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
