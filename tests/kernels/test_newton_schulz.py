"""Newton-Schulz in stacks: no further from the same polynomial in float64 than torch's Muon, matrix by matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from selective.kernels import newton_schulz_
from selective.kernels.reference import newton_schulz_ as reference

DEFAULT: dict[str, Any] = {"steps": 5, "coefficients": (3.4445, -4.775, 2.0315), "eps": 1e-7}
GENTLE: dict[str, Any] = {"steps": 3, "coefficients": (1.875, -1.25, 0.375), "eps": 1e-5}  # converges to 1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def matrices(count: int, rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((count, rows, columns), generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def of_torch(stack: Tensor, options: dict[str, Any]) -> Tensor:
    arguments = options["coefficients"], options["steps"], options["eps"]
    return torch.stack([_zeropower_via_newtonschulz(matrix, *arguments).to(stack.dtype) for matrix in stack])


def ours(stack: Tensor, scale: Any = 1.0, **options: Any) -> Tensor:
    result = stack.clone()
    newton_schulz_([result], [scale], **(options or DEFAULT))
    return result


def exact(stack: Tensor, **options: Any) -> Tensor:
    result = stack.double()
    reference([result], [1.0], **(options or DEFAULT))
    return result


def error(stack: Tensor, options: dict[str, Any], result: Tensor) -> float:
    return float((result.double() - exact(stack, **options)).norm())


SHAPES = [(8, 8), (12, 40), (40, 12), (33, 7), (64, 64), (1, 50), (50, 1), (3, 200), (96, 130)]


@pytest.mark.parametrize("options", [DEFAULT, GENTLE], ids=["muon", "gentle"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_further_from_float64_than_torch(shape: tuple[int, int], options: dict[str, Any]) -> None:
    """Both are sums of roundings that are as good as random, of 20 matrices.

    Of two sums of the same size, the norms over some hundred numbers differ by less than a tenth. torch rounds a matrix
    of one row thrice, which are all that matter there, and ours once.
    """
    stack = matrices(20, *shape)
    assert error(stack, options, ours(stack, **options)) <= 1.1 * error(stack, options, of_torch(stack, options))


def test_a_product_of_float32_would_be_nearer_and_one_rounding_more_is_noticed() -> None:
    """The twin: the bound is near enough that a result which is rounded to seven bits breaks it."""
    stack = matrices(20, 12, 40)
    coarse = ours(stack)
    coarse = (coarse * 64).round() / 64
    assert error(stack, DEFAULT, coarse) > 1.1 * error(stack, DEFAULT, of_torch(stack, DEFAULT))


def test_the_reference_is_the_polynomial_of_singular_values() -> None:
    stack = matrices(3, 6, 9, dtype=torch.float64)
    u, x, v = torch.linalg.svd(stack, full_matrices=False)
    x = x / x.norm(dim=1, keepdim=True)
    a, b, c = DEFAULT["coefficients"]
    for _ in range(DEFAULT["steps"]):
        x = a * x + b * x**3 + c * x**5
    torch.testing.assert_close(exact(stack), u * x[:, None, :] @ v, rtol=0, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 12), columns=st.integers(1, 12), wide=st.integers(1, 3), tall=st.integers(1, 3),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_a_shape_and_its_transposed_one_share_a_stack(rows: int, columns: int, wide: int, tall: int, seed: int) -> None:
    """Transposed matrices give transposed results, with scales of their own."""
    first, second = matrices(wide, rows, columns, seed), matrices(tall, columns, rows, seed + 1)
    together = [first.clone(), second.clone()]
    newton_schulz_(together, [0.5, torch.tensor(-2.0, dtype=torch.float64)], **DEFAULT)
    whole = exact(torch.cat([first, second.mT]))
    # 15 products of numbers below 2, each rounded to 8 bits: 2^-8 each, which the iterations magnify by at most 3.4
    room = 2.0**-4
    assert float((together[0] - 0.5 * whole[:wide]).abs().max()) <= 0.5 * room
    assert float((together[1] + 2.0 * whole[wide:].mT).abs().max()) <= 2.0 * room


def test_what_is_not_finite_stays_where_it_is_and_zero_is_zero() -> None:
    stack = matrices(4, 6, 9)
    alone = ours(stack[:1])
    stack[1, 2, 3], stack[2, 0, 0] = torch.nan, torch.inf
    stack[3] = 0.0
    result = ours(stack)
    torch.testing.assert_close(result[:1], alone, rtol=0, atol=2.0**-6)  # its last bits may depend on the stack
    assert result[1].isnan().all()
    assert not result[2].isfinite().all()
    assert torch.equal(result[3], torch.zeros_like(result[3]))


def test_a_norm_below_eps_is_taken_for_eps() -> None:
    stack = matrices(2, 6, 9) * 1e-9
    wanted = stack.double() / DEFAULT["eps"]
    a, b, c = DEFAULT["coefficients"]
    for _ in range(DEFAULT["steps"]):
        square = wanted @ wanted.mT
        wanted = a * wanted + (b * square + c * square @ square) @ wanted
    torch.testing.assert_close(exact(stack), wanted, rtol=1e-12, atol=0)
    assert error(stack, DEFAULT, ours(stack)) <= 1.1 * error(stack, DEFAULT, of_torch(stack, DEFAULT))


def test_float64_and_no_elements_and_autocast() -> None:
    stack = matrices(2, 5, 8, dtype=torch.float64)
    assert ours(stack).dtype == torch.float64
    torch.testing.assert_close(ours(stack).float(), ours(stack.float()), rtol=0, atol=2.0**-5)  # rounded elsewhere
    for shape in ((0, 5), (5, 0)):
        assert ours(matrices(2, *shape)).shape == (2, *shape)
    with torch.autocast(DEVICE, torch.float16):
        inside = ours(stack)
    assert torch.equal(inside, ours(stack))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_may_be_a_tensor(dtype: torch.dtype) -> None:
    stack = matrices(2, 5, 7, dtype=dtype)
    results = [stack.clone() for _ in range(3)]
    scales = (0.25, torch.tensor(0.25), torch.tensor(0.25, device=DEVICE))
    for result, scale in zip(results, scales, strict=True):
        newton_schulz_([result], [scale], **DEFAULT)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
