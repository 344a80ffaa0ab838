"""Chains on the GPU path: shared launches and their tables, and steps in a CUDA graph.

The first tests run on a GPU where there is one, else on the CPU with interpreted kernels.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy
import pytest
import torch
from chains import equal, net, parts_of, train, two_adamw, values
from torch import nn
from torch.optim import AdamW

from selective import ChainedOptimizer, SelectiveUpdate
from selective.kernels import use_backend
from selective.state.entries import STEP

CUDA = torch.cuda.is_available()


@pytest.fixture
def device() -> Iterator[str]:
    # numpy computes what is interpreted, and warns of overflows and NaN that are meant to happen
    with use_backend("gpu"), numpy.errstate(all="ignore"):
        yield "cuda" if CUDA else "cpu"


def step_apart(model: nn.Module, opt: ChainedOptimizer, step: int) -> None:
    """Step each member by itself, on the gradients of this step."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.device)
    for one in opt.members:
        one.step()


@pytest.mark.parametrize(("policy", "steps"), [pytest.param("MGUP", 5, marks=pytest.mark.slow), ("RandomMask", 3)])
def test_members_share_a_plan_and_step_as_apart(policy: str, steps: int, device: str) -> None:
    model, alone = net().to(device), net().to(device)
    opt, apart = two_adamw(model, policy), two_adamw(alone, policy)
    key, changed = ("alpha", 1.5) if policy == "MGUP" else ("probability", 0.25)
    plans = []
    for step in range(steps):
        if step in (2, 3):  # one member's policy changes, then the other's as well
            for chain in (opt, apart):
                chain.policy_groups[step - 2][key] = changed
        train(model, opt, [step])
        step_apart(alone, apart, step)
        assert equal(values(model), values(alone)), step
        plans += [items.items.cache["plan"] for one in opt.members for items in one.groups.plans[0].kept._lists]
    assert len(plans) == 2 * steps
    assert all(plan is plans[0] for plan in plans)
    assert len(plans[0].batches) == 1


def capturable(device: str) -> tuple[nn.Module, ChainedOptimizer]:
    model = net().to(device)
    members = [SelectiveUpdate(AdamW(p, lr=0.01, capturable=True), policy="RandomMask") for p in parts_of(model)]
    for seed, p in enumerate(model.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    return model, ChainedOptimizer(members)


@pytest.mark.gpu
def test_replays_of_a_chain_are_steps() -> None:
    (model, replayed), (their_model, eager) = capturable("cuda"), capturable("cuda")
    replayed.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed.step()
    for _ in range(3):
        graph.replay()
    replayed.step()
    for _ in range(5):
        eager.step()
    assert equal(values(model), values(their_model))
    for opt in (replayed, eager):
        assert {int(entries[STEP]) for entries in opt.state_dict()["state"].values()} == {5}
