"""Products of float32 matrices and averages of Gram matrices: the kernels against float64 and against torch's own.

Without a GPU Triton's interpreter computes them, in float32: then only the GPU tests say how exact three products of
TF32 are.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gpu_support import CUDA
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from selective.kernels import average_grams_, float32_product, has_float32_products, use_backend
from selective.kernels.gpu import products
from selective.kernels.gpu.products import Tiles

EPS = torch.finfo(torch.float32).eps
SMALL_TILES = Tiles(32, 16, 32, 4, 1)  # so that small matrices have many


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LARGE", SMALL_TILES)
    monkeypatch.setattr(products, "SMALL", SMALL_TILES)


@pytest.mark.parametrize(("kib", "stages"), [(0, 3), (99, 3), (163, 4), (227, 4)])
def test_tiles_fit_into_the_memory_of_a_processor(kib: int, stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_shared_bytes", lambda device: kib << 10)
    gpu = torch.device("cuda", 0)
    assert products.tiles_for(512, 512, gpu) == products.LARGE._replace(stages=stages)
    tiles = products.LARGE._replace(stages=stages)
    assert 4 * tiles.stages * tiles.depth * (tiles.rows + tiles.columns) <= max(kib, 99) << 10
    assert products.tiles_for(512, 16, gpu) == products.SMALL


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def symmetric(count: int, n: int, seed: int = 1) -> Tensor:
    x = drawn(count, n, n, seed=seed)
    return x + x.mT


def exact(average: Tensor, x: Tensor, factors: Tensor, left_out: Tensor, weight: float, side: str) -> Tensor:
    g = x.double()
    outer = g @ g.mT if side == "rows" else g.mT @ g
    added = torch.where(left_out[:, None, None], 0.0, weight * outer)
    return factors.double()[:, None, None] * average.double() + added


def error(result: Tensor, wanted: Tensor) -> float:
    return float((result.cpu().double() - wanted).norm())


def bound(torchs: Tensor, wanted: Tensor) -> float:
    """Twice torch's own distance from float64, and an eps more, which matters for few terms.

    A number in two parts of TF32 is off by up to 2^-23 of itself, and so is each product twice. One in float32 is off
    by 2^-24, and where many are added up, by as much for each sum.
    """
    return 2 * error(torchs, wanted) + EPS * float(wanted.norm())


def both_ways(device: str, count: int, rows: int, columns: int, **more: Any) -> list[dict[str, Tensor]]:
    """The averages of both sides by the kernels, by torch, and in float64; the second of two matrices is left out."""
    x = more.get("x", drawn(count, rows, columns))
    start = {"rows": symmetric(count, rows), "columns": symmetric(count, columns, seed=2)}
    left_out = more.get("left_out", torch.arange(count) % 2 == 1)
    factors = torch.where(torch.arange(count) % 3 == 1, 1.0, 0.9)
    outcomes = []
    for backend in ("gpu", "reference"):
        averages = {side: average.to(device, copy=True) for side, average in start.items()}
        layout = more.get("layout", lambda x: x)
        average_grams_(
            averages["rows"], averages["columns"], layout(x.to(device, copy=True)), factors=factors.to(device),
            left_out=left_out.to(device), weight=0.1, backend=backend,
        )  # fmt: skip
        outcomes.append(averages)
    outcomes.append({side: exact(start[side], x, factors, left_out, 0.1, side) for side in start})
    return outcomes


SIZES = [
    pytest.param(1, 1, 1, marks=pytest.mark.slow),
    (2, 1, 40),
    pytest.param(2, 40, 1, marks=pytest.mark.slow),
    (3, 33, 50),
    pytest.param(2, 70, 20, marks=pytest.mark.slow),
]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("count, rows, columns", SIZES)
def test_averages_are_no_further_from_float64_than_twice_what_torch_is(
    device: str, count: int, rows: int, columns: int
) -> None:
    ours, torchs, wanted = both_ways(device, count, rows, columns)
    for side, exactly in wanted.items():
        assert error(ours[side], exactly) <= bound(torchs[side], exactly)
        assert torch.equal(ours[side], ours[side].mT)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("backend", ["gpu", "reference"])
def test_one_factor_for_all_and_nothing_left_out(device: str, backend: Any) -> None:
    """The bits that tensors of one value give."""
    x, count = drawn(3, 20, 36).to(device), 3
    tensors = {"factors": torch.full((count,), 0.9), "left_out": torch.zeros(count, dtype=torch.bool)}
    outcomes = []
    for numbers in ({"factors": 0.9, "left_out": None}, {name: t.to(device) for name, t in tensors.items()}):
        averages = symmetric(count, 20).to(device), symmetric(count, 36, seed=2).to(device)
        average_grams_(*averages, x, **numbers, weight=0.1, backend=backend)
        outcomes.append(averages)
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])
    assert not torch.equal(outcomes[0][0], symmetric(count, 20).to(device))


@pytest.mark.usefixtures("small_tiles")
@settings(max_examples=30 if CUDA else 2, deadline=None)
@given(
    count=st.integers(1, 3), rows=st.integers(1, 70), columns=st.integers(1, 70), seed=st.integers(0, 99),
    transposed=st.booleans(),
)  # fmt: skip
def test_any_size_and_layout(device, count, rows, columns, seed, transposed) -> None:
    layout = (lambda x: x.mT.contiguous().mT) if transposed else (lambda x: x)
    ours, _, wanted = both_ways(device, count, rows, columns, x=drawn(count, rows, columns, seed=seed), layout=layout)
    for side, exactly in wanted.items():
        assert error(ours[side], exactly) <= 8 * EPS * math.sqrt(max(rows, columns)) * float(exactly.norm())


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_what_is_not_finite_is_seen_where_it_is_not_left_out(device: str, value: float) -> None:
    """On the diagonal, where `gram.observe` looks for it. A matrix that is left out reads none of it."""
    x = drawn(2, 20, 36)
    x[:, 3, 35] = value
    ours, torchs, _ = both_ways(device, 2, 20, 36, x=x, left_out=torch.tensor([False, True]))
    for side in ours:
        for averages in (ours, torchs):
            seen = averages[side].diagonal(dim1=1, dim2=2).isfinite().all(1)
            assert seen.tolist() == [False, True]
        assert torch.equal(ours[side].isnan(), ours[side].mT.isnan())


def test_an_average_with_a_factor_of_one_keeps_its_bits_where_it_is_left_out(device: str) -> None:
    average = symmetric(2, 20).to(device)
    before, ones = average.clone(), torch.ones(2, device=device)
    x = torch.full((2, 20, 7), torch.nan, device=device)
    average_grams_(average, None, x, factors=ones, left_out=ones.bool(), weight=0.1, backend="gpu")
    assert torch.equal(average, before)


def test_only_the_lower_half_of_an_average_is_read(device: str) -> None:
    average, x = symmetric(1, 30).to(device), drawn(1, 30, 5).to(device)
    spoilt = average.tril() + torch.full_like(average, torch.nan).triu(1)
    one = {"factors": torch.full((1,), 0.5, device=device), "left_out": torch.zeros(1, device=device).bool()}
    for rows in (average, spoilt):
        average_grams_(rows, None, x, **one, weight=0.1, backend="gpu")
    assert torch.equal(average, spoilt)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("is_symmetric", [False, True])
def test_a_product_is_that_of_float64_to_rounding(device: str, is_symmetric: bool) -> None:
    a, b = drawn(2, 37, 45), drawn(2, 45, 50, seed=1)
    b = a.mT if is_symmetric else b
    result = float32_product(a.to(device), b.to(device), symmetric=is_symmetric, backend="gpu")
    wanted = a.double() @ b.double()
    assert error(result, wanted) <= bound(a @ b, wanted)
    assert torch.equal(result, result.mT) or not is_symmetric


@pytest.mark.usefixtures("small_tiles")
def test_terms_that_are_zero_may_be_left_out(device: str) -> None:
    """The twin: what lies on the other side of a diagonal is not read, where a tile is far enough from it."""
    root, x = drawn(1, 70, 70).tril().to(device), drawn(1, 20, 70, seed=1).to(device)
    spoilt = root.clone()
    spoilt[:, :10, 60:] = torch.nan
    for lower in (root, spoilt):
        square = float32_product(lower.mT, lower, symmetric=True, upper_a=True, backend="gpu")
        torch.testing.assert_close(square, root.mT @ root)
        torch.testing.assert_close(float32_product(x, lower, lower_b=True, backend="gpu"), x @ root)
    assert float32_product(x, spoilt, backend="gpu").isnan().any()


@pytest.mark.usefixtures("small_tiles")
def test_the_upper_half_is_not_computed_where_a_product_is_said_to_be_symmetric(device: str) -> None:
    """The twin: of a product that is not symmetric the upper half is the lower one's."""
    a, b = drawn(1, 20, 9).to(device), drawn(1, 9, 20, seed=1).to(device)
    lower = float32_product(a, b, symmetric=True, backend="gpu")
    torch.testing.assert_close(lower.tril(), (a @ b).tril())
    assert not torch.allclose(lower, a @ b)
    assert torch.equal(lower, lower.mT)


def test_what_the_kernels_cannot_take_is_refused_by_name(device: str) -> None:
    x = drawn(1, 4, 4).to(device)
    for wrong in (x.double(), x[0]):
        with pytest.raises(ValueError, match=r"backend 'gpu' can't multiply: .*; pass backend='auto'"):
            float32_product(wrong, wrong, backend="gpu")
        assert not has_float32_products(wrong)
    assert has_float32_products(x) is CUDA
    with use_backend("reference"):
        assert not has_float32_products(x)


LARGE_SIZES = [
    (4, 512, 512),
    (4, 512, 1376),
    (4, 1376, 512),
    (2, 768, 2048),
    (2, 2048, 768),
    (3, 333, 1001),
    (2, 64, 4000),
]


@pytest.mark.gpu
@pytest.mark.parametrize("count, rows, columns", LARGE_SIZES)
@pytest.mark.parametrize("scale", ["equal", "spread"])
def test_on_a_gpu_averages_are_as_exact_as_float32(count: int, rows: int, columns: int, scale: str) -> None:
    """In norm, and at the worst element, whose error varies more."""
    x = drawn(count, rows, columns)
    if scale == "spread":  # as gradients are: columns differ by a factor of a thousand
        x *= torch.logspace(0, -3, columns)
    ours, torchs, wanted = both_ways("cuda", count, rows, columns, x=x)
    for side, exactly in wanted.items():
        assert error(ours[side], exactly) <= bound(torchs[side], exactly), side
        worst = [float((averages[side].cpu().double() - exactly).abs().max()) for averages in (ours, torchs)]
        assert worst[0] <= 4 * worst[1], side
        assert torch.equal(ours[side], ours[side].mT)


@pytest.mark.gpu
def test_on_a_gpu_squares_of_an_orthogonal_matrix_are_as_near_the_identity_as_in_float32() -> None:
    """The failing twin is one TF32 product."""
    q = torch.linalg.qr(drawn(2, 2048, 2048).double().to("cuda")).Q.float()
    eye = torch.eye(2048, dtype=torch.float64, device="cuda")
    far = [float((x.double() - eye).norm()) for x in (q.mT @ q, float32_product(q.mT, q, symmetric=True))]
    assert far[1] <= 2 * far[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "PRECISION", "tf32")
        assert float((float32_product(q.mT, q, symmetric=True).double() - eye).norm()) > 2 * far[0]


@pytest.mark.gpu
def test_on_a_gpu_the_host_does_not_wait() -> None:
    x, numbers = drawn(3, 70, 40).cuda(), torch.ones(3, device="cuda")
    rows = torch.zeros(3, 70, 70, device="cuda")
    average_grams_(rows, None, x, factors=numbers, left_out=numbers < 0, weight=0.5)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        average_grams_(rows, None, x, factors=numbers, left_out=numbers < 0, weight=0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(rows.any())
