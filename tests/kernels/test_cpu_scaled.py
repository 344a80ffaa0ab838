"""The last pass of a control: factor · parameter + scale · x, in one operation and in two."""

from __future__ import annotations

import pytest
import torch

from selective.kernels.cpu import chunks, scaled

EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def trials():
    """torch's kernel is tried anew, in the test and after it."""
    scaled._trusted.cache_clear()
    yield
    scaled._trusted.cache_clear()


def assert_right(factor: float, scale: float, dtype: torch.dtype = torch.float32) -> None:
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(3_000, generator=generator, dtype=dtype)
    x = torch.randn(3_000, generator=generator, dtype=dtype) * 0.01
    wanted = factor * param.double() + scale * x.double()
    size = abs(factor) * param.abs().double() + param.abs() + (scale * x.double()).abs()
    scaled.add_scaled_(param, factor, x, scale)
    # The factor, both products and the sum are rounded once or twice each.
    assert bool(((param - wanted).abs() <= 4 * torch.finfo(dtype).eps * size).all())


@pytest.fixture
def runs(monkeypatch, trials) -> list[float]:
    """The scales that torch's kernel is called with."""
    scaled._trusted()
    run, calls = scaled._run, []
    monkeypatch.setattr(
        scaled, "_run", lambda param, factor, x, scale: calls.append(scale) or run(param, factor, x, scale)
    )
    return calls


@pytest.mark.parametrize("factor", [1.0, 0.9999, 0.5, 0.0, -0.1])
@pytest.mark.parametrize("scale", [1.0, 2.1, -0.3])
def test_torchs_kernel_computes_it_in_one_operation(factor, scale, runs) -> None:
    assert_right(factor, scale)
    assert runs == [scale]


@pytest.mark.parametrize(("factor", "scale"), [(0.9, 0.0), (1.0, 0.0), (0.9, 1e-30), (0.9, 1e20), (0.9, -1e-8)])
def test_scales_that_the_kernel_is_not_given(factor, scale, runs, monkeypatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 1_024)
    assert_right(factor, scale)
    assert runs == []


def test_float64_takes_two_operations(runs) -> None:
    assert_right(0.9, 1.5, torch.float64)
    assert runs == []


@pytest.mark.parametrize("build", ["absent", "wrong", "refuses"])
def test_a_build_without_the_kernel_or_with_another_one(build, trials, monkeypatch) -> None:
    theirs = scaled._FUSED_SGD

    def other(*tensors, **numbers):
        if build == "refuses":
            raise TypeError("unexpected keyword argument")
        theirs(*tensors, **(numbers | {"weight_decay": 0.0}))

    monkeypatch.setattr(scaled, "_FUSED_SGD", None if build == "absent" else other)
    assert scaled._trusted() is False
    assert_right(0.9, 1.5)
