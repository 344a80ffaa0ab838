"""The gradients that count as not finite."""

from __future__ import annotations

import pytest
import torch

from selective import MGUP, SelectiveUpdate


def test_a_large_float64_gradient_is_finite() -> None:
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    p.grad = torch.full_like(p, 1e100)  # infinite in float32
    SelectiveUpdate(torch.optim.SGD([p], lr=1e-100), policy=MGUP(), on_nonfinite="raise").step()
    assert torch.equal(p, torch.tensor([-2.0, -0.5, -0.5], dtype=torch.float64))


@pytest.mark.parametrize("bad", [complex(0, float("nan")), complex(float("inf"), 0)])
def test_the_imaginary_part_counts(bad: complex) -> None:
    z = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    z.grad = torch.full_like(z, bad)
    base = torch.optim.SGD([{"params": [z], "policy": None}], lr=0.1)
    optimizer = SelectiveUpdate(base, policy=MGUP(), on_nonfinite="skip")
    optimizer.step()
    assert not z.detach().abs().any()
