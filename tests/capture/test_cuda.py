"""On a GPU: the same steps as on the CPU, and no host synchronisation in one."""

from __future__ import annotations

import pytest
import torch

from selective import (
    MGUP,
    AlphaConsistency,
    Cautious,
    CautiousMGUP,
    Grams,
    Magma,
    Policy,
    RandomMask,
    SelectiveUpdate,
    SkipUpdate,
)
from selective.capture.choose import CaptureName

pytestmark = pytest.mark.gpu

SHAPES = ((64, 48), (48,), (1,), (300, 17), (0,))
POLICIES = [
    MGUP(),
    MGUP(score="momentum", tau=0.3),
    MGUP(quantile="sampled"),
    CautiousMGUP(),
    Cautious(),
    Grams(),
    AlphaConsistency(),
    Magma(),
    SkipUpdate(),
    RandomMask(),
    RandomMask.matching(MGUP()),
    RandomMask.matching(Cautious()),
]
BASES = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "adamw-capturable": lambda p: torch.optim.AdamW(
        p, lr=torch.tensor(1e-2, dtype=torch.float64), weight_decay=0.1, capturable=True
    ),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
}


def params(device: str, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in SHAPES]


def steps(optimizer: torch.optim.Optimizer, ps: list[torch.nn.Parameter], count: int) -> None:
    for step in range(count):
        for index, p in enumerate(ps):
            generator = torch.Generator().manual_seed(100 * step + index)
            p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        optimizer.step()


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("base", BASES)
def test_a_gpu_steps_as_the_cpu_does(base: str, policy: Policy) -> None:
    if base == "adafactor" and policy.needs() & {"momentum", "previous_momentum"}:
        pytest.skip("Adafactor keeps no momentum")
    make = BASES[base]
    ours = params("cuda", torch.float64), params("cpu", torch.float64)
    if base == "adafactor":  # torch's own divides by the size of an empty parameter
        ours = ours[0][:-1], ours[1][:-1]
    for ps in ours:
        lr_on_device = base == "adamw-capturable"
        optimizer = make(ps) if not lr_on_device or ps[0].is_cuda else torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1)
        steps(SelectiveUpdate(optimizer, policy=policy, seed=3), ps, 10)
    for a, b in zip(*ours, strict=True):
        # float64 throughout, so no coordinate changes sides; 10 steps of a few operations each
        torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("base", ["adamw", "adamw-fused", "adamw-capturable", "sgd", "nadam"])
def test_a_step_does_not_wait_for_the_gpu(base: str, policy: Policy) -> None:
    ps = params("cuda", torch.float32)
    optimizer = SelectiveUpdate(BASES[base](ps), policy=policy)
    steps(optimizer, ps, 2)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        optimizer.step()
        optimizer.step()
        found = optimizer.statistics()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(value.is_cuda for entry in found.values() for value in entry.values())


@pytest.mark.parametrize("policy", [MGUP(), Cautious(), AlphaConsistency()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capture", ["scratch", "delta"])
@pytest.mark.parametrize("base", ["adamw", "adamw-capturable", "sgd"])
def test_capturing_does_not_wait_for_the_gpu(base: str, capture: CaptureName, dtype, policy: Policy) -> None:
    """A learning rate on the GPU makes a factor of decay there."""
    ps = params("cuda", dtype)
    optimizer = SelectiveUpdate(BASES[base](ps), policy=policy, capture=capture)
    steps(optimizer, ps, 2)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("capture", ["scratch", "delta"])
def test_a_factor_on_the_gpu_is_that_of_the_number(capture: CaptureName) -> None:
    """In float64, so that no coordinate changes sides. Both count on the GPU: there, torch's own bias corrections are
    float32, whatever the parameters are. A power of two, which float32 holds as it is."""
    lr = 2.0**-7
    ours, theirs = params("cuda", torch.float64), params("cuda", torch.float64)
    for ps, rate in ((ours, torch.tensor(lr, dtype=torch.float64, device="cuda")), (theirs, lr)):
        base = torch.optim.AdamW(ps, lr=rate, weight_decay=0.1, capturable=True)
        steps(SelectiveUpdate(base, policy=MGUP(), capture=capture), ps, 5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_parameters_move(dtype: torch.dtype) -> None:
    ps = params("cuda", dtype)
    before = [p.detach().clone() for p in ps]
    steps(SelectiveUpdate(torch.optim.AdamW(ps, lr=1e-2, eps=1e-4), policy=MGUP()), ps, 10)
    for p, start in zip(ps, before, strict=True):
        assert torch.isfinite(p).all()
        assert p.numel() == 0 or not torch.equal(p, start)
