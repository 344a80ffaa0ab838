"""Products and factors that are made block by block, against torch's own of the whole matrices, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import orthogonality, with_eigenvalues
from torch import Tensor

from selective.preconditioner import blocked
from selective.preconditioner.linalg import settle
from selective.preconditioner.solvers import cholesky

SIZES = [1, 7, 8, 15, 16, 17, 40, 61]  # one block of 8 rows, two, and lasts of every kind


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "BLOCK", 8)


def positive(n: int) -> Tensor:
    x = torch.randn(3, n, 2 * n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    return x @ x.mT / n


@pytest.mark.parametrize("n", SIZES)
def test_lower_halves(n: int) -> None:
    """Equal to rounding; what is above the diagonal's blocks is never read, so that NaN may be there."""
    a = positive(n)
    q = torch.linalg.qr(a)[0]
    lower = torch.linalg.cholesky(a)
    for made, exact in (
        (blocked.lower_product(q, a @ q), q.mT @ a @ q),
        (blocked.squared(lower), lower.mT @ lower),
    ):
        assert torch.allclose(made.tril(), exact.tril(), rtol=0, atol=1e-12)
        half = torch.where(torch.ones(n, n, dtype=torch.bool).tril(), made, torch.nan)
        if n >= 16:  # smaller ones are whole already
            blocks = torch.arange(n) // 8
            same = blocks[:, None] == blocks
            assert torch.allclose(blocked.mirrored(torch.where(same, made, half)), exact, rtol=0, atol=1e-12)
    assert torch.allclose(blocked.times_lower(q, lower), q @ lower, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", SIZES)
def test_factors_are_torchs(n: int) -> None:
    """1e-12: n eps and a condition of less than 100. The inverses are those of the blocks on the diagonal."""
    a = positive(n)
    spoiled = torch.where(torch.ones(n, n, dtype=torch.bool).tril(), a, torch.nan)
    lower, inverses = factored = blocked.factor(spoiled)
    assert torch.allclose(lower, torch.linalg.cholesky(a), rtol=0, atol=1e-12)
    start = 0
    assert len(inverses) == (0 if n < 16 else -(-n // 8))
    for inverse in inverses:
        rows = slice(start, start := start + inverse.shape[-1])
        assert torch.allclose(inverse @ lower[:, rows, rows], torch.eye(inverse.shape[-1]).double(), rtol=0, atol=1e-12)
    x = torch.randn(3, 5, n, dtype=torch.float64)
    assert torch.allclose(blocked.over(x, factored) @ lower.mT, x, rtol=0, atol=1e-11)


def test_what_is_not_positive_definite_spoils_nothing_else() -> None:
    a = positive(40)
    a[1] = -a[1]
    lower = blocked.factor(a).lower
    assert torch.allclose(lower[[0, 2]], torch.linalg.cholesky(a[[0, 2]]), rtol=0, atol=1e-12)


@settings(max_examples=30)
@given(n=st.integers(2, 40), spread=st.floats(0, 5), seed=st.integers(0, 10**6), sort=st.booleans())
def test_cholesky_in_blocks_is_cholesky(n: int, spread: float, seed: int, sort: bool) -> None:
    """The same bases as in one block, to what float64's rounding and the condition of A allow."""
    generator = torch.Generator().manual_seed(seed)
    gram = with_eigenvalues(10.0 ** -(spread * torch.rand(n, generator=generator)), seed=seed).double()[None]
    old = torch.linalg.qr(torch.randn(1, n, n, generator=generator, dtype=torch.float64))[0]
    blocks = cholesky(gram, old, sort)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "BLOCK", 512)
        whole = cholesky(gram, old, sort)
    assert torch.allclose(blocks.basis, whole.basis, rtol=0, atol=1e-13 * n * 10 ** (2 * spread))
    assert torch.equal(blocks.values, whole.values)


def test_the_check_of_a_basis_in_blocks() -> None:
    """`settle` sees an error wherever it is: one that is above the diagonal's blocks is mirrored from below."""
    basis = torch.eye(40)[None]
    assert settle(basis)[1].all()
    for place in ((3, 30), (30, 3), (5, 6)):
        wrong = basis.clone()
        wrong[0][place] = 2.9e-3  # twice in E, so more than LOOSE
        assert not settle(wrong)[1].any()
        wrong[0][place] = 1e-3
        settled, good = settle(wrong)
        assert good.all() and orthogonality(settled) <= 1e-5
