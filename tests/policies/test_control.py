"""The matched random control: as many coordinates of each tensor, same strengths, same norm, but others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from selective import (
    MGUP,
    AlphaConsistency,
    Cautious,
    CautiousMGUP,
    Grams,
    Magma,
    MeanPreserving,
    Policy,
    RandomMask,
    Selection,
    SelectiveUpdate,
)
from selective.kernels import use_backend
from selective.policies import MatchedRandomMask
from selective.policies.kernel_terms import specs_of, specs_on, why_not_in_kernel

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
    """The number of elements with the larger multiplier."""
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
    """Over 400 seeds each of 31 coordinates is chosen as often as the policy chooses in all."""
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


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("way", ["fused", "scratch", "delta"])
def test_the_control_of_grams_stands_still_where_grams_does(way: str, norm: bool) -> None:
    """Rows without a gradient whose momentum is not 0: × 0 in both, and the others × 1 and × -1 as often."""
    found = []
    for policy in (Grams(), RandomMask.matching(Grams(), norm=norm)):
        p = torch.nn.Parameter(torch.zeros(40, 5, dtype=torch.float64))
        base = torch.optim.SGD([p], lr=1.0, momentum=0.5)
        generator = torch.Generator().manual_seed(3)
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        base.step()
        with torch.no_grad():
            p.zero_()
        update = 0.5 * p.grad
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad[10:30] = 0.0
        update = update + p.grad
        SelectiveUpdate(base, policy=policy, capture=way).step()  # type: ignore[arg-type]
        found.append((p.detach(), -p.detach() / update))
    (moved, theirs), (randomly, ours) = found
    assert not theirs[10:30].any()
    assert not ours[10:30].any()
    assert int((ours > 0).sum()) == int((theirs > 0).sum())
    assert int((ours < 0).sum()) == int((theirs < 0).sum())
    assert not torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(randomly.norm(), moved.norm(), rtol=1e-12, atol=0)  # 200 float64 numbers


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


class Larger(Selection):
    """A selection that exists in Python only."""

    def select(self, view: Any) -> Tensor:
        return view.update.abs() > view.update.abs().mean()


class Doubled(MatchedRandomMask):
    """A control with a mask of its own."""

    def mask(self, view: Any) -> Tensor:
        return 2 * super().mask(view)[0]


def trained(policy: Policy, way: str, dtype: torch.dtype, rotated: bool = False) -> list[Tensor]:
    """The parameters after three steps."""
    generator = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in ((60, 50), (31,), ())]
    options: Any = {"preconditioner": "Soap"} if rotated else {}
    base = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)
    optimizer = SelectiveUpdate(base, policy=policy, capture=way, seed=3, **options)  # type: ignore[arg-type]
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize(("way", "rotated"), [("fused", False), ("scratch", False), ("delta", False), ("fused", True)])
@pytest.mark.parametrize("policy", [Cautious(), MGUP(tau=0.3), Grams(), Magma()], ids=str)
def test_kernels_and_the_policys_own_code_step_alike(
    policy: Policy, way: str, rotated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same draws: a run that began when the control was torch code of its own goes on with the same choices."""
    control = RandomMask.matching(policy)
    calls: list[int] = []
    mask = MatchedRandomMask.mask
    monkeypatch.setattr(MatchedRandomMask, "mask", lambda self, view: calls.append(1) or mask(self, view))
    in_kernels = trained(control, way, torch.float32, rotated)
    assert not calls
    monkeypatch.setattr(MatchedRandomMask, "specs", lambda self: None)
    in_torch = trained(control, way, torch.float32, rotated)
    assert calls
    for ours, theirs in zip(in_kernels, in_torch, strict=True):
        # Another coordinate would be off by an update, 1e-2; sums that were added in another order by some 1e-6 of one,
        # which a rotation spreads and the second moments of the next steps pass on.
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5 if rotated else 1e-7)


def test_kernels_take_it_everywhere() -> None:
    p = [torch.nn.Parameter(torch.zeros(3, 4))]
    control = RandomMask.matching(Cautious())
    specs = specs_of(control)
    assert specs is not None
    for backend in ("auto", "cpu", "gpu", "reference"):
        with use_backend(backend):  # type: ignore[arg-type]
            assert specs == specs_on(control, p)
            assert why_not_in_kernel(specs[0], p) is None
    assert specs_of(RandomMask.matching(Policy(selection=Larger(), strength=MeanPreserving()))) is None
    assert specs_of(Doubled(policy=Cautious())) is None  # its mask is not what the kernels would do


def test_a_mask_of_ones_own_is_called() -> None:
    """The twin of the above: a subclass's mask is twice the control's."""
    single, doubled = masks(RandomMask.matching(Cautious())), masks(Doubled(policy=Cautious()))
    for a, b in zip(single, doubled, strict=True):
        torch.testing.assert_close(b, 2 * a, rtol=1e-9, atol=1e-9)
