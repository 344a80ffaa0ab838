"""On a GPU: rotated steps as on the CPU, and no host synchronisation in one without a refresh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transforms import FixedRotation, Turning

from selective import MGUP, Cautious, Dense, Policy, SelectiveUpdate

pytestmark = pytest.mark.gpu

SHAPES = ((64, 48), (48,), (64, 48), (1,))
BASES: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw-capturable": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), weight_decay=0.1, capturable=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2, weight_decay=0.1),
}


def made(base: str, device: str, **options: Any) -> tuple[list[torch.nn.Parameter], SelectiveUpdate]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in SHAPES]
    return params, SelectiveUpdate(BASES[base](params), **options)


def steps(optimizer: SelectiveUpdate, params: list[torch.nn.Parameter], count: int) -> None:
    for step in range(count):
        for index, p in enumerate(params):
            generator = torch.Generator().manual_seed(100 * step + index)
            p.grad = torch.randn(p.shape, generator=generator).to(p.device)
        optimizer.step()


@pytest.mark.parametrize("space", ["rotated", "original"])
@pytest.mark.parametrize("base", ["adamw", "sgd", "nadam"])
def test_a_gpu_steps_as_the_cpu_does(base: str, space: Any) -> None:
    found = []
    for device in ("cuda", "cpu"):
        params, optimizer = made(base, device, preconditioner=FixedRotation(), mask_space=space)
        steps(optimizer, params, 5)
        found.append([p.detach().cpu() for p in params])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # products of 64 terms, and Adam's division by small v


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("policy", [Dense(), MGUP(), Cautious()], ids=repr)
@pytest.mark.parametrize("base", BASES)
def test_a_step_without_a_refresh_does_not_wait_for_the_gpu(base: str, policy: Policy) -> None:
    params, optimizer = made(base, "cuda", policy=policy, preconditioner=Turning(every=100))
    steps(optimizer, params, 3)  # both bases are made in the first two
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        optimizer.step()
        found = optimizer.statistics()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(value.is_cuda for entry in found.values() for value in entry.values())
