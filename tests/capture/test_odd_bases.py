"""Bases that keep books of their own: a list of parameters, a counter in the group."""

from __future__ import annotations

import pytest
import torch

from selective import MGUP, SelectiveUpdate
from selective.base import base_facts as base_facts_module


class Sums(torch.optim.Optimizer):
    """p <- p - lr * t * g, counting its steps in the group, as some packages do, under a name of its own."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "rounds": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["rounds"] += 1
            for p in group["params"]:
                p.sub_(group["lr"] * group["rounds"] * p.grad)


class OwnList(Sums):
    """Steps the parameters that it was constructed with, and looks at their values."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.mine = [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.mine:
            if p.grad is None:
                continue
            p.sub_(0.1 * p.grad * p.norm())


def test_a_base_that_steps_a_list_of_its_own_is_refused() -> None:
    """Its step can't be measured on stand-ins: it would have passed for one that does not look at parameters."""
    with pytest.raises(ValueError, match="did not move the tensors that stand in"):
        SelectiveUpdate(OwnList([torch.nn.Parameter(torch.ones(3, 3))]), policy=MGUP())


def test_a_counter_in_the_group_is_not_measured_again_in_every_step(monkeypatch) -> None:
    measured = []
    real = base_facts_module._measure
    monkeypatch.setattr(base_facts_module, "_measure", lambda *a: measured.append(1) or real(*a))
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = SelectiveUpdate(Sums([p]), policy=MGUP())
    for _ in range(12):
        p.grad = torch.ones(4)
        optimizer.step()
    assert len(measured) <= 2  # at construction, and when the counter has left 0
    # 0.1 * (1 + ... + 12) = 7.8, × 2 and × 1/2; a sum of 12 float32 terms
    torch.testing.assert_close(p.detach(), torch.tensor([-15.6, -15.6, -3.9, -3.9]))


def test_a_step_that_was_replaced_on_the_instance_runs() -> None:
    """The fused rule is the class's; somebody's own step must not be left out silently."""
    p = torch.nn.Parameter(torch.zeros(4))
    base = torch.optim.SGD([p], lr=0.1)
    optimizer = SelectiveUpdate(base, policy=MGUP())
    original, called = base.step, []

    def step(closure=None):
        called.append(1)
        return original(closure)

    vars(base)["step"] = step
    p.grad = torch.ones(4)
    optimizer.step()
    assert called == [1]
    assert "replaced on the instance" in optimizer.explain()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.2, -0.2, -0.05, -0.05]))
