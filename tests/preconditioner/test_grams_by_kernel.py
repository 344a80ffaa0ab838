"""Averages of Gram matrices in lists, by the Triton kernel: interpreted on a machine without a GPU."""

from __future__ import annotations

import numpy
import pytest
import torch

from selective import Eigenbasis
from selective.kernels import use_backend
from selective.preconditioner.gram import gram

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("value", [1.0, torch.nan, torch.inf, 1e30])
def test_a_list_is_averaged_as_by_torch(value: float) -> None:
    """To rounding; and what is not finite, or not once it is squared, leaves average and counter as it does there."""
    space = Eigenbasis(beta=0.5)
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(1, 9, 20, generator=generator) for _ in range(3)]
    grads[1][0, 2, 3] = value
    outcomes = []
    for backend in ("gpu", "reference"):
        states = [{name: x.to(DEVICE) for name, x in space.init_state(g).items()} for g in grads]
        with use_backend(backend), numpy.errstate(all="ignore"):  # the interpreter computes with numpy
            for _ in range(2):
                space.observe(states, [g.to(DEVICE) for g in grads])
        outcomes.append(states)
    for ours, wanted in zip(*outcomes, strict=True):
        assert int(ours["skipped"]) == int(wanted["skipped"])
        for side in ("rows_gram", "columns_gram"):
            torch.testing.assert_close(ours[side], wanted[side], rtol=1e-5, atol=1e-5)
            assert torch.equal(ours[side], ours[side].mT)
    assert int(outcomes[0][1]["skipped"]) == (0 if value == 1.0 else 2)


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_a_gram_matrix_is_that_of_torch_to_rounding(side: str) -> None:
    x = torch.randn(2, 9, 20, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    wanted = x @ x.mT if side == "rows" else x.mT @ x
    assert torch.equal(gram(x, side), wanted) or DEVICE == "cuda"  # type: ignore[arg-type]
    with use_backend("gpu"):
        torch.testing.assert_close(gram(x, side), wanted)  # type: ignore[arg-type]
