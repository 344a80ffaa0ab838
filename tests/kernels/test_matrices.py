"""Norm control of lists of matrices: the kernels against the reference, and both against float64.

Without a GPU Triton's interpreter runs the kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_support import CUDA
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from selective.kernels import (
    Matrices,
    hold_matrices_,
    norm_sums,
    reference,
    turn_matrices_,
    turned_matrices,
    use_backend,
)
from selective.kernels.cpu import matrices as by_cpu
from selective.kernels.gpu import matrices as launches

DEVICE = "cuda" if CUDA else "cpu"
F32 = torch.float32
DTYPES = [F32, torch.bfloat16, torch.float16]
# one size, several matrices in it, a size that fills no block, one whose matrices begin at odd addresses, one element
READINGS = [((8, 16), Matrices(1, 8, 16)), ((3, 8, 16), Matrices(3, 8, 16)), ((15, 7), Matrices(3, 5, 7)),
            ((1, 1), Matrices(1, 1, 1)), ((20, 26), Matrices(2, 10, 26))]  # fmt: skip


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small matrices have many programs, and the last one is not full."""
    monkeypatch.setattr(launches, "BLOCK", 64)
    monkeypatch.setattr(launches, "BLOCKS", 2)
    monkeypatch.setattr(by_cpu, "CHUNK", 50)


def drawn(size: tuple[int, ...], dtype: torch.dtype, count: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(dtype).to(DEVICE) for _ in range(count)]


def exact(old: Tensor, now: Tensor, matrices: Matrices, from_zero: bool, rate: float) -> Tensor:
    """The formula in float64, matrix by matrix; [n, count, rows * columns]."""
    w, after = (x.double().reshape(len(old), matrices.count, -1) for x in (old, now))
    d = after if from_zero else after - w
    norm, length = w.norm(dim=2, keepdim=True), d.norm(dim=2, keepdim=True)
    moved = w + rate * norm * d / length
    return moved * norm / moved.norm(dim=2, keepdim=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("size", [size for size, _ in READINGS], ids=str)
def test_a_copy_has_all_bits(size: tuple[int, ...], zero: bool, dtype: torch.dtype) -> None:
    params = drawn(size, dtype)
    before = [p.clone() for p in params]
    old = hold_matrices_(params, zero=zero, backend="gpu")
    assert old.shape == (3, *size) and old.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(old, before, strict=True))
    wanted = [torch.zeros_like(p) if zero else p for p in before]
    assert all(torch.equal(p, w) for p, w in zip(params, wanted, strict=True))


CELLS = [("gpu", dtype) for dtype in DTYPES] + [("cpu", F32), ("cpu", torch.float64)] * (not CUDA)


@pytest.mark.parametrize(("backend", "dtype"), CELLS, ids=lambda value: str(value).replace("gpu", "kernels"))
@pytest.mark.parametrize("from_zero", [False, True])
@pytest.mark.parametrize(("size", "matrices"), READINGS, ids=str)
def test_the_turn_is_that_of_float64(
    size: tuple[int, ...], matrices: Matrices, from_zero: bool, backend: Any, dtype: torch.dtype
) -> None:
    """A few roundings of float32 of numbers below 8, and half a place of the parameter's dtype."""
    old, params = torch.stack(drawn(size, dtype)), drawn(size, dtype, seed=1)
    now, rate = torch.stack(params), 0.3
    sums = norm_sums(params, old, matrices=matrices, from_zero=from_zero, backend=backend)
    theirs = reference.norm_sums(params, old, matrices=matrices, from_zero=from_zero)
    assert sums.shape == theirs.shape == (3, 3, matrices.count)
    torch.testing.assert_close(sums, theirs, rtol=1e-5, atol=1e-5 * matrices.rows * matrices.columns)
    options: dict[str, Any] = {"matrices": matrices, "from_zero": from_zero}
    turn_matrices_(params, old, sums, **options, rate=rate, backend=backend)
    wanted = exact(old, now, matrices, from_zero, rate)
    close = {"rtol": torch.finfo(dtype).eps / 2 + 1e-6, "atol": 4e-6}
    torch.testing.assert_close(torch.stack(params).double().reshape(wanted.shape), wanted, **close)
    whole = turned_matrices(list(now), old, theirs, **options, rate=rate)
    torch.testing.assert_close(whole.double().reshape(wanted.shape), wanted, rtol=1e-6, atol=4e-6)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 40), count=st.integers(1, 3), rate=st.floats(0, 0.9),
    dtype=st.sampled_from(DTYPES), from_zero=st.booleans(),
)  # fmt: skip
def test_a_turn_keeps_norms(
    rows: int, columns: int, count: int, rate: float, dtype: torch.dtype, from_zero: bool
) -> None:
    size, matrices = (count * rows, columns), Matrices(count, rows, columns)
    old, params = torch.stack(drawn(size, dtype, 2)), drawn(size, dtype, 2, seed=1)
    sums = norm_sums(params, old, matrices=matrices, from_zero=from_zero, backend="gpu")
    number: Any = torch.tensor(rate, device=DEVICE) if rows % 2 else rate
    turn_matrices_(params, old, sums, matrices=matrices, from_zero=from_zero, rate=number, backend="gpu")
    norms = [x.double().reshape(2, count, -1).norm(dim=2) for x in (old, torch.stack(params))]
    torch.testing.assert_close(norms[1], norms[0], rtol=torch.finfo(dtype).eps + 1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["gpu", "reference", "cpu"], ids=["kernels", "torch", "chunks"])
def test_nothing_moved_zeros_and_nan(backend: Any) -> None:
    """An update of 0 changes no bit, a matrix of zeros stays so, and a NaN reaches all of its matrix and no other."""
    matrices = Matrices(4, 2, 5)
    old, params = torch.stack(drawn((8, 5), F32, 1)), [torch.zeros(8, 5, device=DEVICE)]
    old[0, 2:4] = 0
    params[0][2:] = torch.randn(6, 5, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    params[0][7, 4] = float("nan")
    with use_backend(backend):
        sums = norm_sums(params, old, matrices=matrices, from_zero=True)
        turn_matrices_(params, old, sums, matrices=matrices, from_zero=True, rate=0.5)
    assert torch.equal(params[0][:2], old[0, :2])
    assert not params[0][2:4].any()
    assert params[0][4:6].isfinite().all() and params[0][6:].isnan().all()


def test_nobody_reads_or_writes_beside_the_tensors() -> None:
    """Parameters and copies inside of memory full of NaN, which stays as it is."""
    matrices, size = Matrices(1, 7, 11), 77
    room = torch.full((4, size + 16), float("nan"), device=DEVICE)
    params = [row[8 : 8 + size].view(7, 11) for row in room[:2]]
    for p, values in zip(params, drawn((7, 11), F32, 2), strict=True):
        p.copy_(values)
    inside = room[2:].view(-1)[8 : 8 + 2 * size].view(2, 7, 11)
    inside.copy_(hold_matrices_(params, zero=True, backend="gpu"))
    for p in params:
        p.copy_(torch.ones(7, 11))
    sums = norm_sums(params, inside, matrices=matrices, from_zero=True, backend="gpu")
    turn_matrices_(params, inside, sums, matrices=matrices, from_zero=True, rate=0.1, backend="gpu")
    assert all(p.isfinite().all() for p in params) and sums.isfinite().all()
    assert int(room.isnan().sum()) == room.numel() - 4 * size


def test_what_the_kernels_do_not_take_goes_to_torch() -> None:
    side = Matrices(3, 4, 2, beside=3)
    wide, double = drawn((4, 6), F32), drawn((4, 6), torch.float64)
    strided = [p.mT for p in drawn((6, 4), F32)]
    assert not launches.holds(double) and not launches.holds(strided) and launches.holds(wide)
    for params, matrices in ((wide, side), (double, Matrices(1, 4, 6)), (strided, Matrices(1, 4, 6))):
        old = hold_matrices_(params, zero=False)
        for p in params:
            p.add_(1)
        now = torch.stack(list(params))
        sums = norm_sums(params, old, matrices=matrices, from_zero=False)
        turn_matrices_(params, old, sums, matrices=matrices, from_zero=False, rate=0.2)
        parts = [torch.stack(x.split(2, dim=-1), 1) if matrices is side else x for x in (old, now)]
        wanted = exact(*parts, matrices, False, 0.2)
        found = torch.stack([torch.stack(p.split(2, dim=1)) if matrices is side else p for p in params])
        torch.testing.assert_close(found.double().reshape(wanted.shape), wanted, rtol=1e-6, atol=4e-6)


def test_a_table_of_addresses_is_made_once() -> None:
    params = drawn((8, 16), F32)
    first = launches._pointers(params, 128)[0]
    assert launches._pointers(params, 128)[0] is first
    assert launches._pointers(params[::-1], 128)[0] is not first


def test_without_triton_the_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selective.kernels.matrices.why_no_triton", lambda: "there is no Triton")
    with pytest.raises(ValueError, match="can't keep norms: there is no Triton"):
        hold_matrices_(drawn((2, 2), F32), zero=False, backend="gpu")
