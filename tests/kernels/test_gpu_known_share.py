"""Exact top-K that preserves the mean: the multiplier is known before the step, unless many scores are NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_support import (
    F32,
    assert_same_sums,
    bound_of,
    copied,
    few_samples,
    gpu,
    made,
    missing_brackets,
    no_repair,
    reference,
    short_lists,
)
from step_cases import RULES

from selective.kernels import Draw, GivenRule, Item, Selection, Strength, selective_step
from selective.kernels.gpu import launch

SCRATCH, GIVEN = GivenRule(negated=True, factor=0.9), GivenRule(offset=1.0)  # in one pass; in two


def with_few_numbers(rule: GivenRule, numel: int, device: str) -> Item:
    """An item of which seven scores in ten are NaN, although its update is not."""
    item = made(rule, (numel,), seed=1)
    item.grad[torch.rand(numel, generator=torch.Generator().manual_seed(2)) < 0.7] = torch.nan
    if rule is SCRATCH:
        item.state["start"] = item.param
    return copied(item, device)


def step_of_few_numbers(rule: GivenRule, numel: int, device: str) -> tuple[Any, Any, float]:
    """The sums of the kernels and of the reference, and how far the parameters are apart, in bounds of rounding."""
    start = with_few_numbers(rule, numel, device)
    how = {"selection": Selection("top_k", fraction=0.6), "strength": Strength("mean_preserving", rest=0.25, cap=1e9)}
    item = copied(start)
    sums = gpu(item, rule, **how)
    twin, wanted = reference(start, rule, **how)
    # what a repair corrects is rounded twice
    apart = (item.param.cpu().double() - twin.param.double()).abs() / (2 * bound_of(start, twin))
    return sums, wanted, float(apart.max())


@pytest.mark.parametrize(
    "rule, numel, trouble",
    [
        (SCRATCH, 900, "none"),
        (SCRATCH, 200, "none"),
        (GIVEN, 900, "none"),
        pytest.param(SCRATCH, 900, "missed", marks=pytest.mark.slow),
        pytest.param(SCRATCH, 900, "overflow", marks=pytest.mark.slow),
        pytest.param(GIVEN, 900, "missed", marks=pytest.mark.slow),
        pytest.param(GIVEN, 900, "overflow", marks=pytest.mark.slow),
    ],
)
def test_fewer_numbers_than_k_have_the_multiplier_of_their_count(rule, numel, trouble, device, monkeypatch) -> None:
    few_samples(monkeypatch)
    if trouble == "missed":
        missing_brackets(monkeypatch)
    if trouble == "overflow":
        short_lists(monkeypatch)
    sums, wanted, apart = step_of_few_numbers(rule, numel, device)
    assert int(sums.selected) == int(wanted.selected) < int(0.6 * numel)
    assert float(sums.strength_selected) == pytest.approx(float(wanted.strength_selected), rel=1e-6)  # as float32
    assert apart <= 1
    assert float(sums.masked_sq) == pytest.approx(float(wanted.masked_sq), rel=1e-5)  # as `assert_same_sums`


@pytest.mark.parametrize("rule", [SCRATCH, pytest.param(GIVEN, marks=pytest.mark.slow)], ids=["one pass", "two passes"])
def test_without_the_repair_the_multiplier_is_that_of_k(rule, device, monkeypatch) -> None:
    """The failing twin."""
    few_samples(monkeypatch)
    no_repair(monkeypatch)
    sums, wanted, apart = step_of_few_numbers(rule, 900, device)
    assert abs(float(sums.strength_selected) - float(wanted.strength_selected)) > 0.1
    assert apart > 1


@pytest.mark.parametrize("rule", ["adamw", pytest.param("lion", marks=pytest.mark.slow)])
def test_it_is_the_step_with_that_multiplier_as_a_constant(rule, device, monkeypatch) -> None:
    """Bit for bit, in as many launches: no sums are formed."""
    few_samples(monkeypatch)
    names: list[str] = []
    really = launch.run

    def counted(kernel: Any, *arguments: Any, **constants: Any) -> None:
        names.append(kernel.fn.__name__)
        really(kernel, *arguments, **constants)

    monkeypatch.setattr(launch, "run", counted)
    items, launches = [], []
    for strength in (Strength("mean_preserving", rest=0.25, cap=3.0), Strength("fixed", 1.75, 0.25)):
        names.clear()
        mine = [copied(made(RULES[rule], (n,), (F32, F32, F32), 1, n), device) for n in (40, 1200)]
        selective_step(mine, rule=RULES[rule], selection=Selection("top_k", fraction=0.5), strength=strength,
                       draw=Draw(7, 3), backend="gpu")  # fmt: skip
        items.append(mine)
        launches.append([*names])
    assert launches[0] == launches[1]
    assert "sums_kernel" not in launches[0]
    for mean, fixed in zip(*items, strict=True):
        assert torch.equal(mean.param, fixed.param)


def test_a_cap_and_tensors_of_which_all_or_none_are_ranked(device, monkeypatch) -> None:
    """K = 0 is dense, with multipliers of 1; an empty tensor is stepped beside the others."""
    few_samples(monkeypatch)
    rule = RULES["adamw"]
    for fraction, rest, numel in ((0.001, 0.5, 30), (1.0, 0.5, 30), (0.1, 0.5, 300), (0.1, 0.5, 0)):
        start = made(rule, (numel,), seed=1)
        how = {"selection": Selection("top_k", fraction=fraction),
               "strength": Strength("mean_preserving", rest=rest, cap=2.0)}  # fmt: skip
        assert_same_sums(gpu(copied(start, device), rule, **how), reference(start, rule, **how)[1])
