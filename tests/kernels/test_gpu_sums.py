"""The report of a step of the GPU path, and the sums that strengths are made of: right, in any number of programs."""

from __future__ import annotations

import pytest
import torch
from gpu_support import BF16, CUDA, F32, assert_same_sums, copied, few_samples, gpu, made, missing_brackets, reference
from step_cases import RULES, STRENGTHS

from selective.kernels import AdamRule, Draw, GivenRule, Item, Selection, Strength, selective_step
from selective.kernels.spec import SUM_NAMES, SumsTable

ADAM = RULES["adamw"]


@pytest.mark.parametrize("numel", [1, 31, 1024, 1025, 4096, 4097, 9000])
@pytest.mark.parametrize("strength", ["fixed", "mean", "norm_update", "norm_momentum", "alignment"])
def test_sums_at_the_edges_of_blocks(strength, numel, device, monkeypatch):
    few_samples(monkeypatch)
    start, how = made(ADAM, (numel,), seed=1), {"selection": Selection("agreement"), "strength": STRENGTHS[strength]}
    item = copied(start, device)
    sums = gpu(item, ADAM, **how)
    assert_same_sums(sums, reference(start, ADAM, **how)[1])


@pytest.mark.parametrize("trouble", [False, True])
@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_sums_of_what_is_settled_later(rule, trouble, device, monkeypatch):
    """In one pass, decided in four kernels: each coordinate is counted once, also where a bracket missed."""
    few_samples(monkeypatch)
    if trouble:
        missing_brackets(monkeypatch)
    rule = RULES[rule]
    for numel in (300, 2500):
        start = made(rule, (numel,), seed=1)
        how = {"selection": Selection("top_k", fraction=0.3), "strength": Strength("fixed", 2.0, 0.5)}
        sums = gpu(copied(start, device), rule, **how)
        assert_same_sums(sums, reference(start, rule, **how)[1])


def test_the_sums_are_one_table_in_the_order_of_the_items(device):
    """Of two batches, which have launches of their own."""
    dtypes = [(F32, F32, F32), (BF16, BF16, BF16)]
    items = [copied(made(ADAM, (n,), dtypes[n % 2], address=n), device) for n in (8, 5, 0, 7, 6)]
    sums = selective_step(items, rule=ADAM, selection=Selection("everything"), strength=Strength("fixed"),
                          draw=Draw(0, 0), statistics=True, backend="gpu")  # fmt: skip
    assert isinstance(sums, SumsTable)
    assert [s.numel for s in sums] == [int(s.selected) for s in sums] == [8, 5, 0, 7, 6]
    assert sums.values.dtype == torch.float64
    assert sums.values.shape == (5, len(SUM_NAMES))
    assert sums.values.device.type == device


def test_constants_are_reported_as_they_are_written(device):
    """Not as float32 has them."""
    item = copied(made(ADAM, (40,)), device)
    sums = gpu(item, ADAM, selection=Selection("agreement"), strength=Strength("fixed", 1.7, 0.1))
    assert (float(sums.strength_selected), float(sums.strength_rest)) == (1.7, 0.1)


@pytest.mark.parametrize("kind", ["mean_preserving", "norm_preserving"])
def test_a_preserved_sum_is_preserved(kind, device):
    """The strength keeps its promise, by what the step did: the mean of the mask, the norm of the update."""
    start = made(ADAM, (2000,))
    start.param.zero_()
    item = copied(start, device)
    sums = gpu(item, AdamRule(1e-2, 0.9, 0.99, 1e-8), selection=Selection("agreement"),
               strength=Strength(kind, rest=0.3, cap=1e9))  # fmt: skip
    if kind == "mean_preserving":
        share = float(sums.selected) / 2000
        mean = share * float(sums.strength_selected) + (1 - share) * float(sums.strength_rest)
        assert mean == pytest.approx(1.0, rel=1e-6)
    else:
        # 2000 squares, each some eps off, in sums of float32
        assert float(sums.masked_sq) == pytest.approx(float(sums.update_sq), rel=1e-5)
        assert float(item.param.double().square().sum()) == pytest.approx(float(sums.update_sq), rel=1e-5)


def test_a_cap_and_a_rest_that_is_too_much(device):
    for strength in (Strength("norm_preserving", cap=1.01), Strength("norm_preserving", rest=2.0, cap=5.0),
                     Strength("mean_preserving", cap=1.01), Strength("mean_preserving", rest=1.0)):  # fmt: skip
        start = made(ADAM, (500,))
        sums = gpu(copied(start, device), ADAM, selection=Selection("agreement"), strength=strength)
        wanted = reference(start, ADAM, selection=Selection("agreement"), strength=strength)[1]
        assert float(sums.strength_selected) == pytest.approx(float(wanted.strength_selected), rel=1e-6, abs=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("strength", ["fixed", "mean", "norm_update"])
def test_counts_beyond_float32(strength):
    """40 million selected, which float32 can't count; and a sum of as many equal squares."""
    numel = 40_000_001
    one = torch.ones(numel, device="cuda")
    item = Item(torch.zeros_like(one), one, {"update": one * 0.1, "start": torch.zeros_like(one)}, 0)
    sums = gpu(item, GivenRule(), selection=Selection("agreement"), strength=STRENGTHS[strength])
    assert int(sums.selected) == numel
    assert float(sums.update_sq) == pytest.approx(numel * float(torch.tensor(0.1).square()), rel=1e-6)
    assert CUDA
