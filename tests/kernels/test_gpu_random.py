"""Random masks, stochastic rounding and samples of the GPU path: the reference's, bit for bit, also by a clock."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from gpu_support import (
    BF16,
    F16,
    F32,
    assert_same_step,
    assert_same_sums,
    copied,
    few_samples,
    gpu,
    made,
    reference,
)
from step_cases import RULES

from selective.kernels import (
    Draw,
    GivenRule,
    Item,
    Selection,
    Strength,
    uniform_bits,
)
from selective.kernels.gpu.device.random import bracket_position

ADAM = RULES["adamw"]
DRAWS = [Draw(0, 0), Draw(2**63 + 5, 10**9), Draw(-1, 1), Draw(7, 2**40)]
SAMPLED = [
    (Selection("top_k", quantile="sampled", fraction=0.3), Strength("fixed", 1.0, 0.5)),
    (Selection("agreement"), Strength("mean_preserving", cap=9.0, estimate="sampled")),
    (Selection("bernoulli"), Strength("norm_preserving", estimate="sampled")),
]


def clock_of(draw: Draw, device: str) -> Draw:
    """The same numbers, read on the device; what the host says is something else."""
    seed = draw.seed - (1 << 64) if draw.seed >= 1 << 63 else draw.seed
    return replace(draw, seed=123, step=45, clock=torch.tensor([seed, draw.step], device=device))


def given(numel, device: str, dtype: torch.dtype = F32, address: int = 3) -> Item:
    """A step whose result is -u exactly, where selected: 0 elsewhere."""
    shape = numel if isinstance(numel, tuple) else (numel,)
    zero, one = torch.zeros(shape, dtype=dtype, device=device), torch.ones(shape, dtype=dtype, device=device)
    return Item(zero, one, {"update": -one, "start": zero.clone()}, address)


@pytest.mark.parametrize("draw, by_clock", [(d, False) for d in DRAWS] + [(d, True) for d in DRAWS])
def test_masks_are_of_the_reference_bits(draw, by_clock, device):
    how = {"draw": clock_of(draw, device) if by_clock else draw, "strength": Strength("fixed", 1.0, 0.0)}
    for address in (0, 12_345_678):
        for unit, count in (("element", 30 * 77), ("row", 30), ("tensor", 1)):
            for probability in (1e-3, 0.37) if address else (0.0, 1.0):
                item = given((30, 77), device, address=address)
                gpu(item, GivenRule(), selection=Selection("bernoulli", unit=unit, probability=probability), **how)
                kept = uniform_bits(draw, address, count) < round(probability * 2**24)
                wanted = kept.reshape(-1, 1).expand(-1, 30 * 77 // count).reshape(30, 77)
                assert torch.equal(item.param.cpu() == 1, wanted)


@pytest.mark.parametrize("by_clock", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_stochastic_rounding_is_the_reference_bit_for_bit(dtype, by_clock, device):
    """From sums that are the same in float32: start + u, u any float32, start of the parameter's dtype."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.cat([
        torch.randn(2000, generator=generator), torch.randn(2000, generator=generator) * 1e-6,
        torch.randn(500, generator=generator) * 1e-39, torch.randn(500, generator=generator) * 7e4,
        torch.tensor([0.0, -0.0, 1.0, torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).max, 3.4e38, 1e-45, -1e-45,
                      torch.finfo(dtype).tiny, -torch.finfo(dtype).tiny / 3, 2.0**-133, 2.0**-24, 65519.9]),
    ])  # fmt: skip
    for draw in (Draw(1, 2, stochastic=True), Draw(2**63 + 5, 0, stochastic=True), Draw(1, 2)):
        zero = torch.zeros(exact.shape, dtype=dtype)
        start = Item(zero, torch.ones_like(exact), {"update": -exact, "start": zero.clone()}, 8)
        item, how = copied(start, device), {"selection": Selection("everything"), "strength": Strength("fixed")}
        gpu(item, GivenRule(), draw=clock_of(draw, device) if by_clock else draw, **how)
        twin, _ = reference(start, GivenRule(), draw=draw, **how)
        nan = twin.param.isnan()
        assert torch.equal(item.param.cpu().isnan(), nan)
        assert torch.equal(item.param.cpu().view(torch.int16)[~nan], twin.param.view(torch.int16)[~nan])


@pytest.mark.parametrize("rule", [ADAM, RULES["lion"], RULES["sgd_nesterov"]], ids=["adam", "lion", "sgd"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_a_stochastic_step_is_the_reference(rule, dtype, device, monkeypatch):
    few_samples(monkeypatch)
    for selection in (Selection("top_k"), Selection("bernoulli", unit="row")):
        start = made(rule, (30, 60), (dtype, dtype, F32), seed=1)
        item, draw = copied(start, device), Draw(5, 6, stochastic=True)
        how = {"selection": selection, "strength": Strength("fixed", 1.0, 0.25), "draw": draw}
        gpu(item, rule, **how)
        twin, _ = reference(start, rule, **how)
        assert_same_step(start, item, twin)
        # The draw is compared with a number that is some eps of float32 off: it decides otherwise in 2^-15 of them.
        assert int((item.param.cpu() != twin.param).sum()) <= 2


@triton.jit
def _draw(out_ptr, count, numel, shift, BLOCK: tl.constexpr):
    i = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    first, second = tl.full((), 12345, tl.uint32), tl.full((), 4_000_000_000, tl.uint32)
    tl.store(out_ptr + i, bracket_position(i, tl.load(numel), tl.load(shift), first, second), mask=i < count)


@pytest.mark.parametrize("numel, shift", [(257, 4), (4096, 8), (9_999, 9), (11_534_336, 11), (2**31 - 1, 11)])
def test_a_bracket_is_drawn_in_whole_bursts(numel, shift, device):
    """Groups of 16 that begin at multiples of 16, one in each of 2^shift equal ranges of the whole groups."""
    count = 16 << shift
    out = torch.empty(count, dtype=torch.int64, device=device)
    given = (torch.tensor(n, dtype=torch.int64, device=device) for n in (numel, shift))
    _draw[(-(-count // 256),)](out, count, *given, BLOCK=256)
    groups = out.view(-1, 16).cpu()
    first = groups[:, 0]
    assert torch.equal(groups, first[:, None] + torch.arange(16))
    assert not (first % 16).any()
    stratum = torch.arange(1 << shift)
    whole = numel // 16
    assert (first // 16 >= stratum * whole >> shift).all()
    assert (first // 16 < (stratum + 1) * whole >> shift).all()
    if whole >= 64 << shift:  # not always the same place of a range: of 64 and more, uniform ones have the mean 1/2
        place = (first // 16 - (stratum * whole >> shift)).double() / (whole / (1 << shift))
        assert abs(place.mean().item() - 0.5) < 5 * (1 / 12) ** 0.5 / (1 << shift) ** 0.5 + 1 / 64


@pytest.mark.parametrize("selection, strength", SAMPLED)
def test_samples_are_drawn_where_the_reference_draws_them(selection, strength, device):
    """A tensor of more than a sample, from which sums to 1e-5 tell one sample from the next."""
    rule, how = RULES["scratch"], {"selection": selection, "strength": strength}
    start = made(rule, (70_001,), seed=1)
    item = copied(start, device)
    sums = gpu(item, rule, **how)
    twin, wanted = reference(start, rule, **how)
    assert_same_step(start, item, twin)
    assert_same_sums(sums, wanted)
    another = reference(start, rule, draw=Draw(8, 3), **how)[1]
    with pytest.raises(AssertionError):  # the failing twin: another seed, another sample
        assert_same_sums(sums, another)
