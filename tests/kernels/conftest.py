"""Fixtures that the kernel tests share."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from selective.kernels import AdamRule, GivenRule, Item, LionRule, SGDRule


@pytest.fixture(scope="session")
def transcription():
    """The float64 transcription, a plain file beside this one."""
    path = Path(__file__).with_name("transcription.py")
    spec = importlib.util.spec_from_file_location("kernel_transcription", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 16 elements, so that small tensors have many."""
    from selective.kernels.cpu import chunks

    monkeypatch.setattr(chunks, "CHUNK", 16)


def _make(rule, shape, dtype=torch.float32, seed=0, address=5) -> Item:
    """An item in mid-training (SGD: before its first step), with well spread random numbers."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale=1.0):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    param, grad = normal(), normal(0.1)
    state: dict = {}
    if isinstance(rule, AdamRule):
        state = {"step": torch.tensor(3.0), "exp_avg": normal(0.05), "exp_avg_sq": normal(0.1).square()}
        if rule.amsgrad:
            state["max_exp_avg_sq"] = normal(0.1).square()
    elif isinstance(rule, LionRule):
        state = {"exp_avg": normal(0.05)}
    elif isinstance(rule, GivenRule):
        state = {"update": normal(0.01), "start": param.clone(), "momentum": normal(), "previous_momentum": normal()}
    elif isinstance(rule, SGDRule) and rule.momentum and seed % 2:
        state = {"momentum_buffer": normal(0.05)}
    return Item(param, grad, state, address)


@pytest.fixture(scope="session")
def make():
    return _make


@pytest.fixture(scope="session")
def copy():
    """An item with storage of its own, layouts kept."""

    def _copy(item: Item) -> Item:
        return Item(
            item.param.clone(),
            item.grad.clone(),
            {k: v.clone() for k, v in item.state.items()},
            item.address,
            {k: v.clone() for k, v in item.policy_state.items()},
        )

    return _copy


@pytest.fixture(scope="module")
def device():
    """The device on which the GPU path is tried: a GPU where there is one, else the CPU, interpreted.

    The interpreter computes with numpy, which warns of overflows and NaN that are meant to happen.
    """
    import numpy

    with numpy.errstate(all="ignore"):
        yield "cuda" if torch.cuda.is_available() else "cpu"
