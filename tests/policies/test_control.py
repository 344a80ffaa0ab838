"""The matched random control: as many coordinates of each tensor, same strengths, same norm, but others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from selective import MGUP, AlphaConsistency, Cautious, CautiousMGUP, Grams, Policy, RandomMask, SelectiveUpdate

SHAPES = ((20, 10), (31,), (4, 5, 6), (1,))
POLICIES = [Cautious(), MGUP(), MGUP(tau=0.2, alpha=1.5, gamma=0.5), CautiousMGUP(), AlphaConsistency(), Grams()]


def masks(policy: Policy | None, way: str = "auto", seed: int = 0, steps: int = 3) -> list[Tensor]:
    """The multipliers of every tensor in the last of some steps: the parameters are 0 before it and the first moments
    those of dense steps, so that -p / u is the mask; None gives u itself."""
    generator = torch.Generator().manual_seed(5)
    params = [torch.nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in SHAPES]
    base = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)
    for number in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                p.zero_()
        if number < steps - 1 or policy is None:
            base.step()
    if policy is not None:
        SelectiveUpdate(base, policy=policy, capture=way, seed=seed).step()  # type: ignore[arg-type]
        return [-p.detach() / u for p, u in zip(params, masks(None, steps=steps), strict=True)]
    return [-p.detach() for p in params]


# masks are quotients of float64 numbers that were computed in two ways: some ten roundings of 2^-53
CLOSE = 1e-13


def counted(mask: Tensor) -> int:
    """How many have the larger multiplier."""
    return int((mask > mask.max() - 1e-9).sum()) if float(mask.max() - mask.min()) > 1e-9 else mask.numel()


@pytest.mark.parametrize("way", ["fused", "scratch", "delta"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_same_count_and_norm_but_other_coordinates(policy: Policy, way: str) -> None:
    updates = masks(None)
    theirs, ours = masks(policy, way), masks(RandomMask.matching(policy), way)
    for u, a, b in zip(updates, theirs, ours, strict=True):
        assert counted(b) == counted(a)
        torch.testing.assert_close((b * u).norm(), (a * u).norm(), rtol=CLOSE * u.numel(), atol=0)
        if u.numel() > 10:  # of ten or more coordinates the same ones would be chosen once in a hundred tries
            assert not torch.equal(b > b.mean(), a > a.mean())


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_without_norm_the_strengths_are_the_policys_own(policy: Policy) -> None:
    for a, b in zip(masks(policy), masks(RandomMask.matching(policy, norm=False)), strict=True):
        torch.testing.assert_close(b.flatten().sort().values, a.flatten().sort().values, rtol=1e-11, atol=1e-11)


def test_the_choice_is_by_seed_and_not_by_torchs_generators() -> None:
    policy = RandomMask.matching(Cautious())
    before = torch.random.get_rng_state()
    first, again, other = masks(policy), masks(policy), masks(policy, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0] > 0, other[0] > 0)


def test_the_random_subset_is_fair() -> None:
    """Which coordinates: over 400 seeds each of 31 is chosen as often as the policy chooses in all."""
    hits, total = torch.zeros(31), 0
    for seed in range(400):
        mask = masks(RandomMask.matching(MGUP(tau=0.4), norm=False), seed=seed, steps=1)[1]
        hits += (mask > 1).float()
        total += int((mask > 1).sum())
    assert total == 400 * 12  # floor(0.4 * 31)
    share = 12 / 31
    deviation = (share * (1 - share) * 400) ** 0.5
    # 4.5 standard deviations: with fair draws one of 31 is farther off in 1 of 5,000 choices of seeds
    assert bool(((hits - share * 400).abs() < 4.5 * deviation).all())


def test_norm_scaling_is_capped() -> None:
    """One coordinate holds all of the update's norm: the control seldom hits it and may not blow the others up."""
    p = torch.nn.Parameter(torch.zeros(100, dtype=torch.float64))
    control = RandomMask.matching(MGUP(tau=0.01, alpha=1, gamma=0), cap=3.0)
    optimizer = SelectiveUpdate(torch.optim.SGD([p], lr=1.0, momentum=0.9), policy=control)
    p.grad = torch.ones(100, dtype=torch.float64)
    p.grad[17] = 1e6
    optimizer.step()
    assert int((p != 0).sum()) == 1
    assert float(p.detach()[17]) == 0.0  # seed 0 draws another one
    assert float(p.detach().min()) == -3.0
