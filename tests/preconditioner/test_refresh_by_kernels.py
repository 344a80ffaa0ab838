"""Refreshes whose products are made by the Triton kernel: the same bases as by torch's products in float32.

Without a GPU the kernel is interpreted. Then its products are exact, and what is tested is which of them are made.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matrices import apart, hard_grams, orthogonal, orthogonality, with_eigenvalues
from torch import Tensor

from selective import Eigenbasis
from selective.kernels import use_backend
from selective.preconditioner import blocked
from selective.preconditioner.linalg import LOOSE_IN_TF32, settle
from selective.preconditioner.solvers import cholesky

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def products_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], tuple[str, ...]]]:
    """The shape of each product that the kernel makes, with what was said of its factors."""
    made = []
    real = blocked.float32_product

    def counted(a: Tensor, b: Tensor, **said: Any) -> Tensor:
        made.append(((*a.shape, b.shape[2]), tuple(said)))
        return real(a, b, **said)

    monkeypatch.setattr(blocked, "float32_product", counted)
    return made


def problem(n: int) -> tuple[Tensor, Tensor]:
    """A Gram matrix whose eigenvalues fall by a factor of a million, and a basis near its eigenvectors."""
    gram = with_eigenvalues(torch.logspace(0, -6, n), seed=n).double()
    turned = torch.linalg.eigh(gram)[1].flip(-1) + 1e-3 * orthogonal(n, seed=1)
    return gram.float()[None].to(DEVICE), torch.linalg.qr(turned).Q.float()[None].to(DEVICE)


def test_the_kernel_makes_all_large_products_of_a_refresh(products_of_the_kernel: list[Any]) -> None:
    """Aᵀq, qᵀAq, rootᵀroot, q root; and qᵀq where the result is checked. The bases differ by rounding."""
    gram, old = problem(24)
    with use_backend("gpu"):
        ours, trusted = settle(cholesky(gram, old).basis)
    said = [what for _, what in products_of_the_kernel]
    assert said == [(), ("symmetric",), ("symmetric", "upper_a"), ("lower_b",), ("symmetric",)]
    with use_backend("reference"):
        wanted, _ = settle(cholesky(gram, old).basis)
    assert len(products_of_the_kernel) == 5
    assert trusted.all()
    assert orthogonality(ours.cpu()) <= 1e-5
    assert apart(ours.cpu(), wanted.cpu()) <= 1e-4  # neighbouring columns whose eigenvalues are half as large again


@pytest.mark.parametrize("kind", ["symmetric", "triangular", "general"])
def test_each_kind_of_product_can_be_left_to_torch(
    kind: str, products_of_the_kernel: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(blocked.BY_KERNEL, kind, False)
    with use_backend("gpu"):
        settle(cholesky(*problem(4)).basis)
    assert len(products_of_the_kernel) == {"symmetric": 2, "triangular": 4, "general": 4}[kind]


def test_products_in_float64_are_torchs(products_of_the_kernel: list[Any]) -> None:
    """The fallbacks are solved in float64, which no kernel has."""
    x = torch.randn(1, 6, 6, dtype=torch.float64, device=DEVICE)
    assert torch.equal(blocked.product(x, x), x @ x)
    assert torch.equal(blocked.lower_product(x, x), x.mT @ x)
    assert not products_of_the_kernel


@pytest.mark.gpu
@pytest.mark.parametrize("n", [64, 512, 1376, 2048])
@pytest.mark.parametrize("spread", ["random", "in one direction"])
def test_on_a_gpu_what_is_trusted_is_orthogonal_to_1e_5(n: int, spread: str) -> None:
    """With an error just below the largest that is trusted."""
    generator = torch.Generator().manual_seed(n)
    error = torch.randn(n, n if spread == "random" else 1, generator=generator, dtype=torch.float64)
    error = error + error.mT if spread == "random" else error @ error.mT
    q = orthogonal(n, seed=0)
    near = q @ (torch.eye(n, dtype=torch.float64) + error * (0.49 * LOOSE_IN_TF32 / error.norm()))
    settled, trusted = settle(near.float()[None].cuda())
    assert trusted.all()
    assert orthogonality(settled.cpu()) <= 1e-5
    far = q @ (torch.eye(n, dtype=torch.float64) + error * (0.6 * LOOSE_IN_TF32 / error.norm()))
    assert not settle(far.float()[None].cuda())[1].any()  # the twin


@pytest.mark.gpu
@pytest.mark.parametrize("n", [512, 1376])
def test_on_a_gpu_refreshes_need_as_few_fallbacks_as_with_torchs_products(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hard Gram matrices, and averages of gradients that drift."""
    rescued = []
    for by_kernel in (True, False):
        for kind in blocked.BY_KERNEL:
            monkeypatch.setitem(blocked.BY_KERNEL, kind, by_kernel)
        space = Eigenbasis(solver="cholesky", sides="rows")
        grams = torch.stack(list(hard_grams(n).values()))
        states = [space.init_state(torch.empty(len(grams), n, n, device="cuda"))]
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            drift = torch.randn(len(grams), n, 8, generator=generator)
            scale = grams.diagonal(dim1=1, dim2=2).amax(1)[:, None, None]
            grams = grams + 1e-2 * scale * (drift @ drift.mT) / n
            states[0]["rows_gram"].copy_(grams)
            space.refresh(states, [torch.empty(len(grams), n, n, device="cuda")])
        assert orthogonality(states[0]["rows_basis"].cpu()) <= 1e-5
        rescued.append([int(states[0][name]) for name in ("float64", "cpu", "kept")])
    assert sum(rescued[0]) <= sum(rescued[1])
