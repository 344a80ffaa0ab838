"""Bases that take the sign of a gradient: rows and columns that no gradient touches stay where they are, if rotated."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_optimizer
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from selective import AdaDiag, Cautious, Eigenbasis, SelectiveUpdate, Soap
from selective.base.base_facts import measured_moments
from selective.base.fused_rules import FusedLion
from selective.capture import rotated_planned
from selective.rotation import carry, noise, rotation

LR, STEPS = 1e-3, 12
SPACES = {
    "soap": Soap(refresh_every=4),
    "eigh": Eigenbasis(refresh_every=4, solver="eigh"),
    "one side": Eigenbasis(sides="rows", refresh_every=3),
    "adadiag++": AdaDiag(sides="two", refresh_every=4),
}


class Signs(torch.optim.Optimizer):
    """The sign of a momentum, in a class that we don't know."""

    def __init__(self, params: Any, lr: float = LR) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.9})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("momentum", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                p.sub_(average.sign(), alpha=group["lr"])


def lion(params: Any) -> torch.optim.Optimizer:
    return pytorch_optimizer.Lion(params, lr=LR, weight_decay=0.0)


def distances(make: Any, space: Any, rows: int, columns: int, seed: int, policy: Any = None) -> tuple[float, float]:
    """The distances, in learning rates, that an element moved which no gradient has touched, and one that was touched.

    Gradients are in as many rows as columns, and their σ are between 1 and 2: all directions there are seen from the
    first step on, and are told from null ones.
    """
    generator = torch.Generator().manual_seed(seed)
    p = torch.nn.Parameter(torch.randn(rows, columns, generator=generator))
    start = p.detach().clone()
    count = min(rows, columns) // 2
    here, there = (torch.randperm(length, generator=generator)[:count] for length in (rows, columns))
    optimizer = SelectiveUpdate(make([p]), policy=policy, preconditioner=space)
    for _ in range(STEPS):
        left, right = (torch.linalg.qr(torch.randn(count, count, generator=generator))[0] for _ in range(2))
        sizes = 1 + torch.rand(count, generator=generator)
        p.grad = torch.zeros_like(p)
        p.grad[here[:, None], there] = left * sizes @ right
        optimizer.step()
    moved, touched = (p.detach() - start).abs() / LR, torch.zeros(rows, columns, dtype=torch.bool)
    touched[here[:, None], there] = True
    return float(moved[~touched].max()), float(moved[touched].max())


PAIRS = [(lion, "soap"), (lion, "adadiag++"), (Signs, "eigh"), (Signs, "one side")]
SHAPES = st.tuples(st.integers(6, 30), st.integers(6, 30))


@pytest.mark.parametrize(("make", "space"), PAIRS)
@settings(max_examples=2)
@given(shape=SHAPES, seed=st.integers(0, 9))
def test_what_no_gradient_touches_stays(make: Any, space: str, shape: tuple[int, int], seed: int) -> None:
    """But for the rounding of the basis: a full step in all directions, times a few eps, times the number of steps."""
    untouched, touched = distances(make, SPACES[space], *shape, seed)
    assert untouched < 0.01 and touched > 1.0


def test_under_a_policy_too() -> None:
    assert distances(lion, SPACES["soap"], 20, 16, 0, Cautious())[0] < 0.01


@pytest.mark.parametrize(("make", "space"), PAIRS)
def test_without_the_floor_it_moves_by_whole_steps(make: Any, space: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The failing twin."""
    monkeypatch.setattr(noise, "FLOOR", 0.0)
    assert distances(make, SPACES[space], 20, 16, 0)[0] > 1.0


def refuse(x: Tensor) -> None:
    raise AssertionError("an element was cleared")


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=LR),
        lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9),
        lambda p: torch.optim.NAdam(p, lr=LR),
        lambda p: torch.optim.RMSprop(p, lr=LR),
        lambda p: torch.optim.Adafactor(p, lr=LR),
    ],
)
def test_bases_whose_updates_shrink_with_the_gradient_are_left_alone(make: Any, monkeypatch) -> None:
    for module in (carry, rotation, rotated_planned):
        monkeypatch.setattr(module, "clear_noise_", refuse)
    distances(make, SPACES["soap"], 8, 6, 0)
    assert not measured_moments(make([torch.nn.Parameter(torch.ones(4, 3))]), {"params": []}).full_steps


def test_signs_are_measured() -> None:
    for make in (lion, Signs):
        base = make([torch.nn.Parameter(torch.ones(4, 3))])
        assert measured_moments(base, base.param_groups[0]).full_steps
    assert FusedLion.moment_kinds.full_steps


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_the_floor_follows_the_size_of_each_matrix(scale: float) -> None:
    """At 1e25, squares are no float32 numbers."""
    x = scale * torch.tensor([[[3.0, 4.0], [1e-5, 1e-4]], [[3e-6, 4e-6], [1e-6, 0.0]]])
    expected = x.clone()
    expected[0, 1, 0] = 0.0  # 64 eps ‖x‖ is 3.8e-5
    noise.clear_noise_(x)
    assert torch.equal(x, expected)


def test_matrices_that_are_not_finite_or_empty_stay() -> None:
    for value in (float("nan"), float("inf")):
        x = torch.tensor([[value, 1e-9], [1.0, 2.0]])
        before = x.clone()
        noise.clear_noise_(x)
        assert torch.equal(x.nan_to_num(7.0), before.nan_to_num(7.0))
    noise.clear_noise_(torch.zeros(0, 3))


@pytest.mark.parametrize("others", [[], [(3,)], [()], [(3,), ()]], ids=str)
def test_signs_are_seen_beside_vectors_and_numbers(others: list[tuple[int, ...]]) -> None:
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in [(8, 6), *others]]
    base = Signs(params)
    assert measured_moments(base, base.param_groups[0]).full_steps


@pytest.mark.parametrize("base", [torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Adamax])
def test_a_parameter_without_dimensions_may_stand_beside_rotated_ones(base: Any) -> None:
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in [(8, 6), ()]]
    optimizer = SelectiveUpdate(base(params), policy=None, preconditioner=Soap())
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in params)
