"""Muon as a known rule on a GPU: torch's momentum, torch's accuracy, no host wait, and steps in a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import Muon
from torch.optim._muon import _zeropower_via_newtonschulz

from selective import MGUP, AlphaConsistency, Cautious, Dense, Policy, RandomMask, SelectiveUpdate
from selective.kernels import newton_schulz_
from selective.kernels.reference import newton_schulz_ as exactly

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SHAPES = ((512, 512), (1376, 512), (512, 1376), (256, 512), (512, 512), (33, 7), (1, 9))
NUMBERS: dict[str, Any] = {"steps": 5, "coefficients": (3.4445, -4.775, 2.0315), "eps": 1e-7}
POLICIES = [MGUP(score="nesterov"), MGUP(), Cautious(), AlphaConsistency(), RandomMask()]


def make_params(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(DEVICE, dtype)) for s in SHAPES]


def give_grads(params: list[torch.nn.Parameter], step: int) -> None:
    for index, p in enumerate(params):
        generator = torch.Generator().manual_seed(100 * step + index)
        p.grad = torch.randn(p.shape, generator=generator).to(DEVICE, p.dtype)


def wrapped(params: list[torch.nn.Parameter], policy: Policy, rate: Any = 0.02, **options: Any) -> SelectiveUpdate:
    return SelectiveUpdate(Muon(params, lr=rate, weight_decay=0.1), policy=policy, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_momentum_is_torchs_bit_for_bit(dtype: torch.dtype) -> None:
    theirs, ours = make_params(dtype), make_params(dtype)
    torchs, optimizer = Muon(theirs, lr=0.02), wrapped(ours, Dense(), capture="fused")
    for step in range(4):
        give_grads(theirs, step)
        give_grads(ours, step)
        torchs.step()
        optimizer.step()
        for p, q in zip(theirs, ours, strict=True):
            assert torch.equal(torchs.state[p]["momentum_buffer"], optimizer.state[q]["momentum_buffer"])


@pytest.mark.parametrize("shape", [(512, 512), (1376, 512), (512, 1376), (33, 7)], ids=str)
def test_no_further_from_float64_than_torch(shape: tuple[int, int]) -> None:
    """As on the CPU: two sums of roundings that are as good as random, of 20 matrices."""
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn((20, *shape), generator=generator).to(DEVICE)
    exact, ours = stack.double(), stack.clone()
    exactly([exact], [1.0], **NUMBERS)
    newton_schulz_([ours], [1.0], **NUMBERS)
    arguments = NUMBERS["coefficients"], NUMBERS["steps"], NUMBERS["eps"]
    torchs = torch.stack([_zeropower_via_newtonschulz(matrix, *arguments) for matrix in stack])
    assert float((ours - exact).norm()) <= 1.1 * float((torchs - exact).norm())


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("rate", [0.02, "tensor"])
def test_no_host_wait(rate: Any, policy: Policy) -> None:
    params = make_params()
    optimizer = wrapped(params, policy, torch.tensor(0.02, device=DEVICE) if rate == "tensor" else rate)
    for step in range(2):
        give_grads(params, step)
        optimizer.step()
    give_grads(params, 2)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("policy", [MGUP(score="nesterov"), Cautious(), RandomMask()], ids=repr)
def test_replays_are_steps_with_the_rate_of_the_moment(policy: Policy) -> None:
    """The rate is a tensor on the device, which is changed between replays."""
    runs = []
    for recorded in (True, False):
        params, rate = make_params(), torch.tensor(0.02, device=DEVICE)
        optimizer = wrapped(params, policy, rate, seed=3)
        give_grads(params, 0)
        optimizer.step()
        graph: Any = None
        if recorded:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
        for step in range(3):
            rate.fill_(0.02 / (step + 1))
            graph.replay() if recorded else optimizer.step()
        runs.append([p.detach().clone() for p in params])
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
