"""Solvers: orthogonal for as long as anyone trains, on any matrix; and the same space, whichever is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import apart, hard_grams, orthogonality, with_eigenvalues

from selective import Eigenbasis
from selective.preconditioner.linalg import settle
from selective.preconditioner.solvers import SOLVERS, cholesky, eigh, qr, singular_vectors

EPS = torch.finfo(torch.float32).eps
NAMES = ["eigh", "svd", "qr", "cholesky"]


def refreshed(solver: str, n: int, count: int, carry: str = "rotate") -> tuple[Any, dict[str, torch.Tensor]]:
    """A stack of hard matrices after `count` refreshes, each between two sets of them, so that the bases move."""
    sets = [torch.stack(list(hard_grams(n, seed).values())) for seed in (0, 100)]
    basis = Eigenbasis(sides="rows", solver=solver, carry=carry)
    grads = [torch.empty(len(sets[0]), n, n)]
    states = [basis.init_state(grads[0])]
    for step in range(count):
        states[0]["rows_gram"].copy_(sets[step % 2])
        basis.refresh(states, grads)
    return basis, states[0]


@pytest.mark.parametrize("carry", ["rotate", "keep"])
@pytest.mark.parametrize("solver", NAMES)
@pytest.mark.parametrize("n,count", [(8, 300), pytest.param(8, 10_000, marks=pytest.mark.slow), (2, 50), (64, 20)])
def test_orthogonal_after_many_refreshes(solver: str, carry: str, n: int, count: int) -> None:
    """1e-5 in the spectral norm, which `settle` gives what is trusted; n eps is the rounding of the measurement."""
    _, state = refreshed(solver, n, count, carry)
    assert orthogonality(state["rows_basis"]) <= 1e-5
    assert int(state["refreshes"]) == count
    assert int(state["kept"]) == 0  # nothing was got by standing still: the zero matrix alone has nothing to solve
    unmoved = [torch.equal(basis, torch.eye(n)) for basis in state["rows_basis"]]
    still = {name for name, same in zip(hard_grams(n), unmoved, strict=True) if same}
    assert {"zero"} <= still <= {"zero", "identity"}


@pytest.mark.parametrize("solver", NAMES)
def test_without_settling_errors_would_add_up(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: the same 20 refreshes are less orthogonal when results are taken as they come."""
    with_it = orthogonality(refreshed(solver, 64, 20)[1]["rows_basis"])
    monkeypatch.setattr("selective.preconditioner.fallbacks.settle", lambda q: (q, settle(q)[1] | True))
    assert orthogonality(refreshed(solver, 64, 20)[1]["rows_basis"]) > with_it


@pytest.mark.parametrize("solver", NAMES)
def test_the_eigenbasis_of_separated_eigenvalues(solver: str) -> None:
    """Power iteration converges to eigh's basis, from any start: the error falls by λᵢ₊₁/λᵢ = ½ a step.

    Directions are known to eps · λ₁ / gap, and the last two eigenvalues are 2^-7 apart; 4 for the sum of roundings.
    """
    gram = with_eigenvalues(0.5 ** torch.arange(8.0), seed=0)[None]
    exact = torch.linalg.eigh(gram.double())[1].flip(-1)
    old, distances = torch.eye(8)[None], []
    for _ in range(40):
        old, good = settle(SOLVERS[solver](gram, old, True).basis)  # type: ignore[index]
        assert good.all()
        distances.append(apart(old, exact))
    assert distances[-1] <= 4 * EPS * 2**7
    assert (distances[0] > 0.01) is (solver in ("qr", "cholesky"))  # those had to converge


@settings(max_examples=60)
@given(n=st.integers(1, 24), spread=st.floats(0, 5), seed=st.integers(0, 10**6), sort=st.booleans())
def test_cholesky_spans_the_flags_that_qr_spans(n: int, spread: float, seed: int, sort: bool) -> None:
    """Column by column, up to sign. Both factor A Q; its condition times eps is what either can know."""
    gram = with_eigenvalues(torch.logspace(0, -spread, n), seed)[None]
    gram = gram / gram.diagonal(dim1=-2, dim2=-1).max()
    old = eigh(with_eigenvalues(torch.linspace(1, 2, n), seed + 1)[None], torch.empty(0)).basis
    first, second = qr(gram, old, sort), cholesky(gram, old, sort)
    assert (first.order is None) is (not sort)
    assert sort is False or torch.equal(first.order, second.order)  # type: ignore[arg-type]
    condition = float(torch.linalg.cond(gram.double()))
    assert apart(settle(first.basis)[0], settle(second.basis)[0]) <= 4 * n * EPS * condition


def test_sorting_puts_the_large_ones_first_and_says_where_they_were() -> None:
    gram = torch.diag(torch.tensor([0.25, 1.0, 0.5, 0.5]))[None]
    for solver in (qr, cholesky):
        found = solver(gram, torch.eye(4)[None], True)
        assert found.order is not None
        assert found.order.tolist() == [[1, 2, 3, 0]]  # equals keep their places
        assert found.values.tolist() == [[1.0, 0.5, 0.5, 0.25]]
        assert torch.equal(settle(found.basis)[0].abs().round(), torch.eye(4)[None][..., [1, 2, 3, 0]])
        assert solver(gram, torch.eye(4)[None], False).values.tolist() == [[0.25, 1.0, 0.5, 0.5]]


def test_a_null_space_stays_where_it_is() -> None:
    """Columns that the Gram matrix says nothing about do not become rounding errors."""
    gram = torch.zeros(1, 6, 6)
    gram[0, 0, 0] = 1
    for solver in (qr, cholesky):
        settled, good = settle(solver(gram, torch.eye(6)[None], True).basis)
        assert good.all()
        assert (settled.abs() - torch.eye(6)).abs().max() <= 2 * EPS
    old = eigh(with_eigenvalues(torch.linspace(1, 2, 6), 0)[None], torch.empty(0)).basis
    raw = torch.linalg.qr(with_eigenvalues(gram[0].diagonal(), 1)[None] @ old).Q  # the twin: the product alone
    again = torch.linalg.qr(with_eigenvalues(gram[0].diagonal(), 1)[None] @ raw).Q
    assert apart(raw, again) > 0.1


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6), (1, 4), (4, 1), (1, 1)])
def test_singular_vectors_of_a_gradient(shape: tuple[int, int]) -> None:
    grad = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    left, right = singular_vectors(grad, rows=True, columns=True)
    diagonal = left.basis.mT.double() @ grad.double() @ right.basis.double()
    sigma = torch.linalg.svdvals(grad.double())
    k = min(shape)
    assert (diagonal.diagonal(dim1=-2, dim2=-1) - sigma).abs().max() <= 16 * EPS * sigma.max()
    diagonal.diagonal(dim1=-2, dim2=-1).zero_()
    assert diagonal.abs().max() <= 16 * EPS * sigma.max()
    assert (left.values.sqrt()[:, :k] - sigma).abs().max() <= 16 * EPS * sigma.max()
    for rows, columns, n in ((True, False, shape[0]), (False, True, shape[1])):
        (only,) = singular_vectors(grad, rows=rows, columns=columns)
        assert only.basis.shape == (2, n, n)
        assert orthogonality(only.basis) <= 8 * n * EPS


def test_one_pass_is_enough_from_a_basis_of_a_while_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eigenvalues over ten orders of magnitude, a basis that is a few degrees off: nothing is left for float64.

    The twin takes the shift away: what rounding makes of the smallest eigenvalues is then no longer positive.
    """
    gram = with_eigenvalues(torch.logspace(0, -10, 128), 0)[None]
    gram = gram / gram.diagonal(dim1=-2, dim2=-1).max()
    noise = torch.randn(128, 128, generator=torch.Generator().manual_seed(1))
    old = torch.linalg.eigh(gram)[1].flip(-1) @ torch.linalg.matrix_exp(0.005 * (noise - noise.mT))
    for sort in (True, False):
        assert settle(cholesky(gram, old, sort).basis)[1].all()
    monkeypatch.setattr("selective.preconditioner.solvers.SHIFT", 0.0)
    assert not settle(cholesky(gram, old).basis)[1].all()
