"""On a GPU: rotated steps as on the CPU, and no host synchronisation in one without a refresh."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from rotated_twins import both
from transforms import FixedRotation, Turning

from selective import MGUP, AdaDiag, Cautious, Dense, Eigenbasis, Policy, SelectiveUpdate
from selective.preconditioner.fallbacks import Reading

pytestmark = pytest.mark.gpu

SELDOM = Eigenbasis(refresh_every=100, stagger=False)
SELDOM_IN_TF32 = Eigenbasis(refresh_every=100, stagger=False, precision="tf32")
OFTEN: dict[str, Any] = {
    "precision": "float32",
    "refresh_every": 2,
    "start_step": 3,
    "stagger": False,
}  # no basis is arbitrary after three gradients
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


@pytest.mark.parametrize("policy", [Dense(), MGUP(), Cautious()], ids=repr)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "space", [Turning(every=100), SELDOM, SELDOM.model_copy(update={"precision": "tf32"})], ids=repr
)
def test_a_step_without_a_refresh_does_not_wait_for_the_gpu(base: str, policy: Policy, space: Any) -> None:
    params, optimizer = made(base, "cuda", policy=policy, preconditioner=space)
    steps(optimizer, params, 3)  # both bases are made in the first two
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        optimizer.step()
        if isinstance(space, Turning):  # an eigenbasis counts its refreshes on the host, and statistics() reads that
            optimizer.statistics()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = optimizer.statistics()
    assert all(value.is_cuda for entry in found.values() for value in entry.values())


@pytest.mark.parametrize("stagger", [False, True, "shapes"])
def test_a_refresh_in_stacks_waits_once_for_the_gpu(stagger: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all shapes that are due. The first bases are made by torch's eigh, which waits by itself."""
    params, optimizer = made("adamw", "cuda", preconditioner=Eigenbasis(refresh_every=4, stagger=stagger))
    steps(optimizer, params, 12)
    waits, generator, for_events = [], torch.Generator().manual_seed(0), []
    wait = torch.cuda.Event.synchronize
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda event: (for_events.append(event), wait(event)))
    for _ in range(4):
        for_events.clear()
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.device)
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        implicit = sum("synchronizing CUDA operation" in str(warning.message) for warning in seen)
        waits.append((implicit, len(for_events)))
    assert (min(waits), max(waits)) == ((0, 0), (0, 1))


def test_flags_are_read_when_their_own_gpu_has_written_them() -> None:
    """The last GPU need not be the current one. Its stream is busy while another one's has nothing to do."""
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    flags = torch.zeros(3, dtype=torch.bool, device=last)
    Reading(flags).wait()  # pinned memory that is used again
    with torch.cuda.device(last):
        torch.cuda._sleep(200_000_000)
        flags.fill_(True)
    with torch.cuda.device(0):
        assert Reading(flags).wait() == [True] * 3


@pytest.mark.parametrize("space", [Eigenbasis(**OFTEN), Eigenbasis(sides="one", **OFTEN), AdaDiag(refresh_every=3)])
@pytest.mark.parametrize("base", ["adamw", "sgd"])
def test_a_gpu_steps_in_stacks_as_bucket_by_bucket(base: str, space: Any) -> None:
    def run() -> list[torch.Tensor]:
        params, optimizer = made(base, "cuda", preconditioner=space, policy=Dense())
        steps(optimizer, params, 6)
        return [p.detach().cpu() for p in params]

    for a, b in zip(*both(run), strict=True):
        # products of 64 terms, bases that are made of such products, and Adam's division
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
