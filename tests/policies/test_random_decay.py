"""The random control of selective decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decay_problems import DECAY, adamw, give_grads, parameters
from torch.optim import SGD

from selective import MGUP, RandomDecay, RandomMask, SelectiveUpdate


def test_the_control_decays_as_large_a_share_of_other_coordinates() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(200, 100, generator=generator) + 0.5
    gradient = torch.where(torch.rand(200, 100, generator=generator) < 0.3, 1.0, -1.0)
    p = torch.nn.Parameter(start.clone())
    opt = SelectiveUpdate(SGD([p], lr=1e-3), RandomMask(), decay=RandomDecay(weight_decay=100.0), seed=5)
    p.grad = gradient
    opt.step()
    change = (p.detach() - start) / start
    decayed = change < -0.05  # decay takes a tenth, the update two thousandths of a half at most
    stepped = (change + 0.1 * decayed).abs() > 1e-4
    agrees = gradient > 0
    n = 20_000
    # binomial: five standard deviations of each share, sqrt(0.21 / n) and sqrt(0.21 / (n / 2))
    assert abs(float(decayed.float().mean()) - float(agrees.float().mean())) < 5 * (0.21 / n) ** 0.5
    for some in (agrees, stepped):  # it follows neither the update nor the policy's coins
        assert abs(float(decayed[some].float().mean()) - 0.3) < 5 * (0.21 / int(some.sum())) ** 0.5


@pytest.mark.parametrize("way", ["fused", "scratch", "delta"])
@pytest.mark.parametrize("space", [None, "rotated", "original"])
def test_the_control_is_the_same_in_every_capture(way: str, space: str | None) -> None:
    ends = []
    for capture in ("fused", way):
        params = parameters(torch.float32)
        rotated: dict[str, Any] = {"preconditioner": "Soap", "mask_space": space} if space else {}
        opt = SelectiveUpdate(adamw(params, DECAY), MGUP(), decay="RandomDecay", capture=capture, **rotated)  # type: ignore[arg-type]
        for step in range(3):
            give_grads(params, step)
            opt.step()
        ends.append([p.detach().clone() for p in params])
    for a, b in zip(*ends, strict=True):  # decay moves a coordinate by 5e-3 of itself; rotations are in float32
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
