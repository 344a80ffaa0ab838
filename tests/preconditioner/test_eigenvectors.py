"""Stacks that are solved several matrices at a time give what torch gives, bit for bit."""

from __future__ import annotations

import pytest
import torch

from selective.preconditioner.eigenvectors import THREADS, eigenvectors, solve_in_threads

cuda = pytest.param("cuda", marks=pytest.mark.gpu)


def grams(batch: int, n: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Gram matrices of rank n/2, so that eigenvalues repeat."""
    x = torch.randn(batch, n, n // 2, generator=torch.Generator().manual_seed(batch * n), dtype=dtype).to(device)
    return x @ x.mT


@pytest.mark.parametrize("device", ["cpu", cuda])
@pytest.mark.parametrize("batch", [1, 2, 3, 2 * THREADS + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_give_the_bits_of_one(device: str, batch: int, dtype: torch.dtype) -> None:
    stack = grams(batch, 48, device, dtype)
    expected = torch.linalg.eigh(stack)
    values, vectors = solve_in_threads(stack, THREADS) if device == "cpu" else eigenvectors(stack)
    assert torch.equal(values, expected.eigenvalues)
    assert torch.equal(vectors, expected.eigenvectors)


def test_threads_work_in_inference_mode() -> None:
    stack = grams(5, 40)
    with torch.inference_mode():
        values, _ = solve_in_threads(stack, THREADS)
    assert torch.equal(values, torch.linalg.eigh(stack).eigenvalues)


def test_an_error_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, solve = grams(5, 40), torch.linalg.eigh

    def fails(matrix: torch.Tensor) -> object:
        if torch.equal(matrix, stack[3]):
            raise RuntimeError("did not converge")
        return solve(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with pytest.raises(RuntimeError, match="did not converge"):
        solve_in_threads(stack, THREADS)


@pytest.mark.gpu
def test_the_current_stream_comes_before_and_after() -> None:
    """The stack is written in the current stream behind a long product, and the result is used there at once."""
    big = torch.randn(4096, 4096, device="cuda")
    expected = torch.linalg.eigh(grams(20, 64, "cuda")).eigenvalues
    for _ in range(5):
        stack = grams(20, 64, "cuda") * torch.nan
        for _ in range(20):
            big = torch.nn.functional.normalize(big @ big)
        stack.copy_(grams(20, 64, "cuda"))
        values, _ = eigenvectors(stack)
        stack.fill_(torch.nan)
        assert torch.equal(values, expected)
