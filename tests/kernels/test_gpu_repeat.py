"""The GPU path again and again: the same bits, and by plans that are kept the same steps as by fresh ones."""

from __future__ import annotations

import pytest
import torch
from gpu_support import BF16, CUDA, F32, assert_equal_items, copied, few_samples, made, rule_on, short_lists
from step_cases import KINDS, RULES

from selective.kernels import Draw, Item, selective_step

ADAM = RULES["adamw"]
DTYPES = [(F32, F32, F32), (BF16, BF16, F32)]
SIZES = (400, 7, 300)


def items_of(rule, device: str, seed: int = 1) -> list[Item]:
    return [copied(made(rule, (n,), DTYPES[i % 2], seed=seed, address=i), device) for i, n in enumerate(SIZES)]


@pytest.mark.parametrize("rule, case", list(zip(["lion", "sgd_nesterov", "adamw"] * 2, KINDS, strict=True)))
def test_the_same_again_is_the_same_bits(rule, case, device, monkeypatch):
    """Also where ties are listed in the order of atomics, and repaired."""
    few_samples(monkeypatch)
    rule, (selection, strength) = RULES[rule], KINDS[case]
    start = items_of(rule, device)
    start[0].grad[torch.arange(400, device=device) % 10 != 0] = 0  # ties, in the way of the K-th
    if case == "top_k_mean":
        short_lists(monkeypatch)
    how = {"selection": selection, "strength": strength, "draw": Draw(1, 2), "statistics": True, "backend": "gpu"}
    first = [copied(item) for item in start]
    wanted = list(selective_step(first, rule=rule_on(rule, device), **how))
    for _ in range(100 if CUDA else 1):
        again = [copied(item) for item in start]
        sums = selective_step(again, rule=rule_on(rule, device), **how)
        assert list(sums) == wanted
        assert_equal_items(first, again)


@pytest.mark.gpu
@pytest.mark.parametrize("case", KINDS)
def test_a_large_tensor_gives_the_same_bits(case, device):
    selection, strength = KINDS[case]
    start = copied(made(ADAM, (3_000_000,), seed=1), device)
    start.grad[torch.rand(start.grad.shape, generator=torch.Generator(device).manual_seed(0), device=device) < 0.3] = 0
    results = []
    for _ in range(100):
        item = copied(start)
        (sums,) = selective_step([item], rule=ADAM, selection=selection, strength=strength, draw=Draw(1, 2),
                                 statistics=True, backend="gpu")  # fmt: skip
        results.append((item.param, sums))
    for param, sums in results[1:]:
        assert torch.equal(param, results[0][0])
        assert sums == results[0][1]
