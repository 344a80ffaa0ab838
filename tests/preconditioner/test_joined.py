"""Weights that are several matrices, one below the other or side by side: as if each were a parameter of its own."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selective import MGUP, AdaDiag, Cautious, Dense, SelectiveUpdate, Soap
from selective.preconditioner import as_matrix, matrix_shape
from selective.preconditioner.matrices import VIEWS, from_matrices

STEPS = 8


def trained(params: list[torch.nn.Parameter], grads: list[list[torch.Tensor]], space: Any, **options: Any) -> Any:
    optimizer = SelectiveUpdate(torch.optim.AdamW(params, lr=1e-2), preconditioner=space, **options)
    for step in grads:
        for p, grad in zip(params, step, strict=True):
            p.grad = grad.clone()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("way", ["rows", "columns"])
@pytest.mark.parametrize("capture", ["fused", "scratch", "delta"])
@pytest.mark.parametrize(
    "space", [Soap(refresh_every=3), AdaDiag(sides="two", refresh_every=3)], ids=["soap", "adadiag"]
)
def test_rotated_as_parameters_of_their_own(space: Any, capture: Any, way: str) -> None:
    """Batched products of the same matrices: equal to rounding, here within 1e-5 after 8 steps of 1e-2."""
    generator = torch.Generator().manual_seed(0)
    size, side = ((24, 6), 0) if way == "rows" else ((8, 18), 1)
    start = torch.randn(*size, generator=generator)
    grads = [torch.randn(*size, generator=generator) for _ in range(STEPS)]
    joined, whole = (torch.nn.Parameter(start.clone()) for _ in range(2))
    apart = [torch.nn.Parameter(part.clone()) for part in start.chunk(3, side)]
    for policy in (Dense(), Cautious(estimate="exact")):
        options = {"policy": policy, "capture": capture}
        trained([joined], [[g] for g in grads], space, matrix_view=f"{way}:3", **options)
        trained(apart, [list(g.chunk(3, side)) for g in grads], space, **options)
        trained([whole], [[g] for g in grads], space, **options)
        if policy == Dense():  # Cautious keeps the mean of what it takes for one tensor
            assert (joined - torch.cat(apart, side)).abs().max() <= 1e-5
            assert (whole - joined).abs().max() > 1e-3  # the twin: as one matrix it is another rotation


def test_what_can_be_taken_apart() -> None:
    shapes = {(24, 6): (3, 8, 6), (3, 5): (3, 1, 5), (2, 24, 6): (6, 8, 6)}
    assert {shape: matrix_shape(torch.empty(shape), "rows:3") for shape in shapes} == shapes
    for odd in ((25, 6), (3, 8, 6), (2, 2, 24, 6)):
        why = matrix_shape(torch.empty(odd), "rows:3")
        assert isinstance(why, str)
        assert "no 3 matrices of equal shape" in why
    shapes = {(6, 24): (3, 6, 8), (2, 6, 24): (6, 6, 8), (8, 24): (3, 8, 8)}
    assert {shape: matrix_shape(torch.empty(shape), "columns:3") for shape in shapes} == shapes
    for odd in ((6, 25), (6, 3), (2, 2, 6, 24)):  # of one column each there would be no matrices
        assert "no 3 matrices of equal shape side by side" in str(matrix_shape(torch.empty(odd), "columns:3"))


@given(view=st.sampled_from(VIEWS), sizes=st.lists(st.integers(1, 6), min_size=2, max_size=4))
@settings(max_examples=60)
def test_a_parameter_as_matrices_and_back(view: Any, sizes: list[int]) -> None:
    param = torch.arange(math.prod(sizes), dtype=torch.float32).reshape(sizes)
    shape = matrix_shape(param, view)
    if isinstance(shape, str):
        return
    matrices = as_matrix(param, shape)
    assert tuple(matrices.shape) == shape
    assert torch.equal(from_matrices(matrices, param.shape), param)
    way, _, count = view.partition(":")
    if way == "columns":  # the definition, in other words
        parts = torch.stack(param.chunk(int(count), -1), dim=-3)
        assert torch.equal(matrices, parts.reshape(shape))
    else:
        assert torch.equal(matrices, param.reshape(shape))
    batch, rows, columns = shape
    for factor in ((batch, rows, 1), (batch, 1, columns)):  # second moments of rows or columns keep their order
        for size in (tuple(n for n in factor if n > 1) or (1,), (batch, max(factor[1:]))):
            stored = torch.arange(math.prod(size), dtype=torch.float32).reshape(size)
            assert torch.equal(as_matrix(stored, factor), stored.reshape(factor))


def test_narrow_products_by_columns() -> None:
    """The products are in bfloat16, of the same numbers: the same but for the order of sums, 8 steps of 1e-2 · 2⁻⁷."""
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(8, 18, generator=generator)
    grads = [torch.randn(8, 18, generator=generator) for _ in range(STEPS)]
    joined = torch.nn.Parameter(start.clone())
    apart = [torch.nn.Parameter(part.clone()) for part in start.chunk(3, 1)]
    space = Soap(refresh_every=3, precision="bfloat16")
    trained([joined], [[g] for g in grads], space, matrix_view="columns:3")
    trained(apart, [list(g.chunk(3, 1)) for g in grads], space)
    assert (joined - torch.cat(apart, 1)).abs().max() <= STEPS * 1e-2 * 2**-7


@pytest.mark.parametrize("capture", ["fused", "scratch", "delta"])
def test_stacks_that_are_joined_by_columns(capture: Any) -> None:
    """As in Llama 4's experts, [experts, in, gates and values]; the same bound as above."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(2, 5, 8, generator=generator)
    grads = [torch.randn(2, 5, 8, generator=generator) for _ in range(STEPS)]
    joined = torch.nn.Parameter(start.clone())
    apart = [torch.nn.Parameter(part.clone()) for part in start.chunk(2, -1)]
    trained([joined], [[g] for g in grads], Soap(refresh_every=3), matrix_view="columns:2", capture=capture)
    split = [list(g.chunk(2, -1)) for g in grads]
    trained(apart, split, Soap(refresh_every=3), matrix_view="experts", capture=capture)
    assert (joined - torch.cat(apart, -1)).abs().max() <= 1e-5


def test_bfloat16_and_a_resumed_run_by_columns() -> None:
    """A run that is saved half-way and loaded goes on bit for bit."""
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(6, 24, generator=generator).bfloat16()
    grads = [[torch.randn(6, 24, generator=generator).bfloat16()] for _ in range(STEPS)]
    through, resumed = (torch.nn.Parameter(start.clone()) for _ in range(2))
    options: dict[str, Any] = {"policy": MGUP(), "matrix_view": "columns:3"}
    trained([through], grads, Soap(refresh_every=3), **options)
    first = trained([resumed], grads[:4], Soap(refresh_every=3), **options)
    again = SelectiveUpdate(torch.optim.AdamW([resumed], lr=1e-2), preconditioner=Soap(refresh_every=3), **options)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    for (grad,) in grads[4:]:
        resumed.grad = grad.clone()
        again.step()
    assert torch.equal(through, resumed)


def test_explain_and_checkpoints_know_the_view() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.nn.Parameter(torch.randn(12, 4, generator=generator)) for _ in range(2))
    grads = [[torch.randn(12, 4, generator=generator)] for _ in range(3)]
    first = trained([p], grads, Soap(), policy=MGUP(), matrix_view="rows:2")
    assert "as 2 of 6 x 4" in first.explain()
    with pytest.raises(ValueError, match="matrix_view"):
        SelectiveUpdate(torch.optim.AdamW([q], lr=1e-2), policy=MGUP(), preconditioner=Soap()).load_state_dict(
            first.state_dict()
        )
    with pytest.raises(ValueError, match="rows:2"):
        SelectiveUpdate(torch.optim.AdamW([q], lr=1e-2), preconditioner=Soap(), matrix_view="rows:5")  # type: ignore[arg-type]
