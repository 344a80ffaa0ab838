"""Weights that are several matrices one below the other: as if each were a parameter of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from selective import MGUP, AdaDiag, Cautious, Dense, SelectiveUpdate, Soap
from selective.preconditioner import matrix_shape

STEPS = 8


def trained(params: list[torch.nn.Parameter], grads: list[list[torch.Tensor]], space: Any, **options: Any) -> Any:
    optimizer = SelectiveUpdate(torch.optim.AdamW(params, lr=1e-2), preconditioner=space, **options)
    for step in grads:
        for p, grad in zip(params, step, strict=True):
            p.grad = grad.clone()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("capture", ["fused", "scratch"])
@pytest.mark.parametrize(
    "space", [Soap(refresh_every=3), AdaDiag(sides="two", refresh_every=3)], ids=["soap", "adadiag"]
)
def test_rotated_as_parameters_of_their_own(space: Any, capture: Any) -> None:
    """Batched products of the same matrices: equal to rounding, here within 1e-5 after 8 steps of 1e-2."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(24, 6, generator=generator)
    grads = [torch.randn(24, 6, generator=generator) for _ in range(STEPS)]
    joined, whole = (torch.nn.Parameter(start.clone()) for _ in range(2))
    apart = [torch.nn.Parameter(part.clone()) for part in start.chunk(3)]
    for policy in (Dense(), Cautious(estimate="exact")):
        options = {"policy": policy, "capture": capture}
        trained([joined], [[g] for g in grads], space, matrix_view="rows:3", **options)
        trained(apart, [list(g.chunk(3)) for g in grads], space, **options)
        trained([whole], [[g] for g in grads], space, **options)
        if policy == Dense():  # Cautious keeps the mean of what it takes for one tensor
            assert (joined - torch.cat(apart)).abs().max() <= 1e-5
            assert (whole - joined).abs().max() > 1e-3  # the twin: as one matrix it is another rotation


def test_what_can_be_taken_apart() -> None:
    shapes = {(24, 6): (3, 8, 6), (3, 5): (3, 1, 5), (2, 24, 6): (6, 8, 6)}
    assert {shape: matrix_shape(torch.empty(shape), "rows:3") for shape in shapes} == shapes
    for odd in ((25, 6), (3, 8, 6), (2, 2, 24, 6)):
        why = matrix_shape(torch.empty(odd), "rows:3")
        assert isinstance(why, str)
        assert "no 3 matrices of equal shape" in why


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
