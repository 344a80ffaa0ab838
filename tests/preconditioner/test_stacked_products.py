"""Products and averages on stacks, against float64 and against the functions that take lists."""

from __future__ import annotations

import pytest
import torch
from matrices import orthogonal

from selective import Eigenbasis
from selective.kernels import Backend, use_backend
from selective.preconditioner.base import State
from selective.preconditioner.gram import Sides
from selective.preconditioner.stacked import Averaging, Part, StackedEigenbasis

F64 = torch.float64
EPS = torch.finfo(torch.float32).eps
COUNT, BATCH, ROWS, COLUMNS = 3, 2, 5, 8
ALL = COUNT * BATCH
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is not interpreted where there is a GPU")
BACKENDS = ["auto", pytest.param("gpu", marks=INTERPRETED)]


def made(sides: Sides) -> tuple[Eigenbasis, Part]:
    """An `Eigenbasis`, and a part with random bases, averages and gradients."""
    options = Eigenbasis(sides=sides, beta=0.75)
    generator = torch.Generator().manual_seed(0)
    state: State = {}
    for side in options.sides_of((BATCH, ROWS, COLUMNS)):
        n = ROWS if side == "rows" else COLUMNS
        state[f"{side}_basis"] = torch.stack([orthogonal(n, seed) for seed in range(ALL)]).float()
        x = torch.randn(ALL, n, n, generator=generator)
        state[f"{side}_gram"] = x @ x.mT
    given = torch.randn(ALL, ROWS, COLUMNS, generator=generator)
    return options, Part(COUNT, state, given, torch.empty_like(given), torch.empty_like(given))


@pytest.mark.parametrize("sides", ["two", "rows", "columns"])
@pytest.mark.parametrize("into", [True, False])
def test_products_are_as_exact_as_those_of_lists(sides: Sides, into: bool) -> None:
    """Each is off by at most n eps of a row's norm, where n terms are added: twice, for two sides."""
    options, part = made(sides)
    x, exact = part.given.clone(), part.given.to(F64)
    for side, left in (("rows", True), ("columns", False)):
        if f"{side}_basis" in part.state:
            basis = part.state[f"{side}_basis"].to(F64)
            basis = basis.mT if into is left else basis
            exact = basis @ exact if left else exact @ basis
    StackedEigenbasis(options).project([part], into=into)
    assert torch.equal(part.given, x)
    limit = 2 * COLUMNS * EPS * x.flatten(1).norm(dim=1).max()
    assert (part.result - exact).abs().max() <= limit
    states = [{k: v[BATCH * i : BATCH * (i + 1)] for k, v in part.state.items()} for i in range(COUNT)]
    lists = (options.project_in if into else options.project_out)(states, list(x.split(BATCH)))
    assert (torch.cat(lists) - exact).abs().max() <= limit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sides", ["two", "rows", "columns"])
def test_averages_are_exact_but_for_rounding(sides: Sides, backend: Backend) -> None:
    """By torch, and by the Triton kernel, which is interpreted here."""
    options, part = made(sides)
    grads, before = part.given.clone(), {k: v.clone() for k, v in part.state.items()}
    counters = torch.zeros(COUNT, dtype=torch.int64), torch.zeros(COUNT, dtype=torch.int64)
    averaging = Averaging([(BATCH, ROWS, COLUMNS)] * COUNT, torch.device("cpu"), *counters)
    with use_backend(backend):
        StackedEigenbasis(options).average(averaging, [part])
    g = grads.to(F64)
    for side, outer in (("rows", g @ g.mT), ("columns", g.mT @ g)):
        if f"{side}_gram" in part.state:
            exact = options.beta * before[f"{side}_gram"].to(F64) + (1 - options.beta) * outer
            assert (part.state[f"{side}_gram"] - exact).abs().max() <= COLUMNS * EPS * exact.abs().max()
    assert not any(counter.any() for counter in counters)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e19, 3e38])
def test_what_cannot_enter_an_average_is_counted(value: float, backend: Backend) -> None:
    """A number that is none counts as a gradient of zeros. One that is too large leaves the averages as they are."""
    options, part = made("two")
    part.given[BATCH + 1, 2, 3] = value  # of the second parameter
    before = {k: v.clone() for k, v in part.state.items()}
    counters = torch.zeros(COUNT, dtype=torch.int64), torch.zeros(COUNT, dtype=torch.int64)
    averaging = Averaging([(BATCH, ROWS, COLUMNS)] * COUNT, torch.device("cpu"), *counters)
    with use_backend(backend):
        StackedEigenbasis(options).average(averaging, [part])
    finite = value in (1e19, 3e38)
    here = slice(BATCH, 2 * BATCH)
    for side in ("rows", "columns"):
        old, new = before[f"{side}_gram"], part.state[f"{side}_gram"]
        assert torch.equal(new[here], old[here] if finite else options.beta * old[here])
        assert not torch.equal(new[:BATCH], old[:BATCH])
        assert new.isfinite().all()
    assert [counter.tolist() for counter in counters] == [[0, not finite, 0], [0, BATCH * finite, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_reach_an_average(dtype: torch.dtype) -> None:
    averages, before = [], torch.get_default_dtype()
    for default in (torch.float32, dtype):
        options, part = made("two")
        try:
            torch.set_default_dtype(default)
            counters = torch.zeros(COUNT, dtype=torch.int64), torch.zeros(COUNT, dtype=torch.int64)
            averaging = Averaging([(BATCH, ROWS, COLUMNS)] * COUNT, torch.device("cpu"), *counters)
            StackedEigenbasis(options).average(averaging, [part])
        finally:
            torch.set_default_dtype(before)
        averages.append(part.state["rows_gram"])
    assert torch.equal(*averages)
