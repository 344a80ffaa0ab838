"""Norm control on a GPU: the steps of the CPU, no host wait after a first step, and steps in a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import AdamW

from selective import MGUP, Cautious, Dense, NormControl, Policy, SelectiveUpdate, Soap

pytestmark = pytest.mark.gpu

LR = 0.02
SHAPES = ((64, 48), (48,), (64, 48), (3, 16, 16), (300, 17))


def parameters(device: str, dtype: torch.dtype) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in SHAPES]


def give_grads(params: list[Any], step: int) -> None:
    for index, p in enumerate(params):
        generator = torch.Generator().manual_seed(100 * step + index)
        grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        p.grad = grad if p.grad is None else p.grad.copy_(grad)


def made(params: list[Any], policy: Policy, lr: Any = LR, capturable: bool = True, **options: Any) -> SelectiveUpdate:
    base = AdamW(params, lr=lr, weight_decay=0.1, capturable=capturable)
    return SelectiveUpdate(base, policy, norm=NormControl(), matrix_view="experts", seed=3, **options)


@pytest.mark.parametrize("policy", [Dense(), Cautious(), MGUP()], ids=repr)
def test_a_gpu_steps_as_the_cpu_does(policy: Policy) -> None:
    """In float64 throughout: ten steps of a few operations each. Torch's capturable step corrects biases in float32."""
    ends = []
    for device in ("cuda", "cpu"):
        params = parameters(device, torch.float64)
        opt = made(params, policy, capturable=False)
        for step in range(10):
            give_grads(params, step)
            opt.step()
        ends.append([p.detach().cpu() for p in params])
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"preconditioner": Soap(refresh_every=100)}, {"stochastic_rounding": True}], ids=str
)
@pytest.mark.parametrize("policy", [Dense(), Cautious(), MGUP()], ids=repr)
def test_a_step_does_not_wait_and_keeps_the_norm(policy: Policy, options: dict[str, Any], dtype: torch.dtype) -> None:
    params = parameters("cuda", dtype)
    before = [p.detach().double().norm() for p in params]
    opt = made(params, policy, **options)
    for step in range(3):
        give_grads(params, step)
        opt.step()
    give_grads(params, 3)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # rounding of the parameters is unbiased, and far smaller over a whole matrix than one place
    close = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 4
    for p, was in zip(params, before, strict=True):
        assert bool(torch.isclose(p.detach().double().norm(), was, rtol=close)) == (p.dim() > 1)


@pytest.mark.parametrize("policy", [Dense(), Cautious(), MGUP()], ids=repr)
def test_replays_of_a_graph_are_steps(policy: Policy) -> None:
    """With a rate on the GPU, which the graph reads. The same bits as eager steps."""
    ends = []
    for recorded in (False, True):
        params, rate = parameters("cuda", torch.float32), torch.tensor(LR, device="cuda")
        opt = made(params, policy, rate)
        for step in range(2):
            give_grads(params, step)
            opt.step()
        if recorded:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                opt.step()
        for step in range(2, 6):
            rate.fill_(LR / step)
            give_grads(params, step)
            graph.replay() if recorded else opt.step()
        ends.append([p.detach().clone() for p in params])
    assert all(torch.equal(eager, replayed) for eager, replayed in zip(*ends, strict=True))
