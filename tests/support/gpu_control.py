"""Helpers for tests of the matched random control in Triton kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_support import assert_same_step, assert_same_sums, copied, gpu, reference

from selective.kernels import Control, Draw, GivenRule, Item, Rule, Selection, Strength
from selective.kernels.reference.control import random_subset

WITHOUT_SUMS = Strength("fixed", 1.0, 0.0)


def controlled(selection: Selection, **how: Any) -> Selection:
    return replace(selection, control=Control(**how))


def agrees(start: Item, rule: Rule, device: str, what: str = "", **how: Any) -> None:
    """Take one step from one start, and compare it with the reference's."""
    item = copied(start, device)
    sums = gpu(item, rule, **how)
    twin, wanted = reference(start, rule, **how)
    assert_same_step(start, item, twin, what)
    assert_same_sums(sums, wanted, what)


def chosen_by_gpu(device: str, numel: int, count: int, draw: Draw, address: int = 4) -> torch.Tensor:
    """The elements of a tensor that the control of its first `count` moves: bool, on the CPU."""
    zeros, ones = torch.zeros(numel, device=device), torch.ones(numel, device=device)
    grad = torch.where(torch.arange(numel, device=device) < count, ones, -ones)
    item = Item(zeros, grad, {"update": ones, "start": zeros.clone()}, address)
    selection = controlled(Selection("agreement"), norm=False)
    sums = gpu(item, GivenRule(), selection=selection, strength=WITHOUT_SUMS, draw=draw)
    assert float(sums.selected) == count
    return (item.param != 0).cpu()


def wanted_of(numel: int, count: int, draw: Draw, address: int = 4) -> torch.Tensor:
    return random_subset(torch.arange(numel) < count, None, draw, address)


def missing_brackets(patch: pytest.MonkeyPatch) -> None:
    """Turn brackets inside out, so that they hold nothing."""
    from selective.kernels.gpu import control as plans

    patch.setattr(plans, "WIDTH", -1000.0)


def short_lists(patch: pytest.MonkeyPatch) -> None:
    """Give the list of a tensor fewer places than its bracket has elements."""
    from selective.kernels.gpu import control as plans

    patch.setattr(plans, "room_of", lambda numel: min(numel, 3))


AGREEMENT = controlled(Selection("agreement"))
