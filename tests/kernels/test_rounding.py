"""The store: stochastic rounding is unbiased, takes neighbours only, and depends on the address alone."""

from __future__ import annotations

import pytest
import torch

from selective.kernels import AdamRule, Draw, Item, Selection, Strength, selective_step
from selective.kernels.reference.rounding import store

LOW = [torch.bfloat16, torch.float16]


def rounded(exact: torch.Tensor, dtype: torch.dtype, step: int = 0) -> torch.Tensor:
    param = torch.full(exact.shape, torch.nan, dtype=dtype)
    store(param, exact, Draw(1, step, stochastic=True), address=3)
    return param


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("value", [1.0001, -1.0001, 0.3, 1e-6, -3e-9, 255.9, 2.0**-14 * 1.0003, 0.99999])
def test_the_mean_is_the_exact_value_and_only_neighbours_are_taken(value: float, dtype: torch.dtype) -> None:
    n = 200_000
    exact = torch.full((n,), value, dtype=torch.float32)
    got = rounded(exact, dtype).double()
    values = got.unique()
    assert len(values) <= 2
    spacing = float(values.max() - values.min())
    assert float(values.min()) <= float(exact[0]) <= float(values.max())
    # the mean of n draws from two values: five standard deviations, and 2^-24 of a spacing from the draw's grid
    share = (float(exact[0].double()) - float(values.min())) / spacing if spacing else 0.0
    sigma = spacing * (share * (1 - share) / n) ** 0.5
    assert abs(float(got.mean()) - float(exact[0].double())) <= 5 * sigma + spacing * 2.0**-23 + 1e-12


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_what_is_representable_or_not_finite_stays(dtype: torch.dtype) -> None:
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, torch.inf, -torch.inf, torch.finfo(dtype).max])
    assert torch.equal(rounded(exact, dtype), exact.to(dtype))
    assert rounded(torch.tensor([torch.nan]), dtype).isnan().all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_tiny_updates_are_kept_on_average(dtype: torch.dtype, backend: str) -> None:
    moved = {}
    for stochastic in (False, True):
        n = 150_000  # more than a chunk
        param = torch.ones(n, dtype=dtype)
        state = {"step": torch.zeros(()), "exp_avg": torch.zeros(n), "exp_avg_sq": torch.zeros(n)}
        for step in range(50):
            item = Item(param, torch.ones(n, dtype=dtype), state, address=0)
            selective_step(
                [item], rule=AdamRule(1e-5, 0.9, 0.99, 1e-8), selection=Selection("everything"),
                strength=Strength("fixed", selected=1.0), draw=Draw(0, step, stochastic), backend=backend,
            )  # fmt: skip
        moved[stochastic] = 1.0 - float(param.double().mean())
    assert moved[False] == 0.0  # the failing twin: to nearest, 50 steps of 1e-5 vanish
    # 50 steps of 1e-5, each with a variance of at most 1e-5 * spacing, over n coordinates: five standard deviations
    spacing = torch.finfo(dtype).eps
    assert abs(moved[True] - 5e-4) <= 5 * (50 * 1e-5 * spacing / n) ** 0.5 + 50 * spacing * 2.0**-24


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_any_cut_of_a_tensor_rounds_alike(dtype: torch.dtype) -> None:
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = rounded(exact, dtype)
    parts = torch.empty_like(whole)
    for start in (0, 300, 700):
        end = {0: 300, 300: 700, 700: 1000}[start]
        store(parts[start:end], exact[start:end], Draw(1, 0, stochastic=True), 3, offset=start)
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, rounded(exact, dtype, step=1))
