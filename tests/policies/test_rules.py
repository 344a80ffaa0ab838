"""Each named policy over AdamW, SGD, Lion and Muon, against a float64 transcription of its paper's formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_optimizer
import torch
import transcribed_bases as written
import transcriptions as rules
from muon_products import in_a_stack
from torch import Tensor
from torch.optim import Optimizer

from selective import (
    MGUP,
    AlphaConsistency,
    Cautious,
    CautiousMGUP,
    Dense,
    Grams,
    Magma,
    Policy,
    RandomMask,
    SelectiveUpdate,
    SkipUpdate,
)  # fmt: skip
from selective.kernels import spec, uniform
from selective.policies import MeanPreserving, NormPreserving

STEPS, SEED = 30, 7
SHAPES = ((12, 8), (8,), (5, 4, 3), (1,))
MATRICES = ((12, 8), (6, 6), (3, 17))

Made = tuple[Callable[[list[Tensor]], Optimizer], Callable[[torch.dtype], written.Base], tuple[tuple[int, ...], ...]]
BASES: dict[str, Made] = {
    "adamw": (lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1), lambda _: written.AdamW(), SHAPES),
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.05), lambda _: written.SGD(), SHAPES),
    "sgd-nesterov": (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.05, nesterov=True),
        lambda _: written.SGD(nesterov=True), SHAPES),
    "lion": (lambda p: pytorch_optimizer.Lion(p, lr=1e-2, weight_decay=0.1), lambda _: written.Lion(), SHAPES),
    "muon": (  # in fused capture
        lambda p: torch.optim.Muon(p, lr=1e-2, weight_decay=0.1),
        lambda d: written.Muon(dtype=d, orthogonalize=in_a_stack), MATRICES),
    "muon-stepped": (  # in the others, which take the base's own step
        lambda p: torch.optim.Muon(p, lr=1e-2, weight_decay=0.1), lambda d: written.Muon(dtype=d), MATRICES),
}  # fmt: skip

POLICIES: dict[str, tuple[Policy, rules.Rule]] = {
    "dense": (Dense(), rules.dense),
    "alpha": (AlphaConsistency(), rules.alpha_consistency()),
    "alpha-current": (AlphaConsistency(momentum="current"), rules.alpha_consistency(current=True)),
    "alpha-update": (
        AlphaConsistency(strength=NormPreserving(of="update")),
        rules.alpha_consistency("update", cap=10.0),
    ),
    "alpha-gradient": (
        AlphaConsistency(strength=NormPreserving(of="gradient", rest=0.3, cap=3)),
        rules.alpha_consistency("gradient", rest=0.3, cap=3.0),
    ),
    "alpha-mean": (
        AlphaConsistency(strength=MeanPreserving(rest=0.1)),
        rules.alpha_consistency("mean", rest=0.1, cap=10.0),
    ),
    "mgup": (MGUP(), rules.mgup()),
    "mgup-third": (MGUP(tau=0.3), rules.mgup(tau=0.3)),
    "mgup-momentum": (MGUP(score="momentum"), rules.mgup(score="momentum")),
    "mgup-nesterov": (MGUP(score="nesterov"), rules.mgup(score="nesterov")),
    "cautious-mgup": (CautiousMGUP(), rules.cautious_mgup()),
    "cautious": (Cautious(), rules.cautious()),
    "grams": (Grams(), rules.grams),
    "magma": (Magma(), rules.magma()),
    "skip-update": (SkipUpdate(), rules.skip_update()),
    "random": (RandomMask(), rules.random_mask()),
    "random-row": (RandomMask(probability=0.3, unit="row"), rules.random_mask(0.3, "row")),
}
# What the official code of MGUP does to each base, gamma 0.1: AdamW and Lion rank u g (Lion's u is a sign), Muon the
# Nesterov momentum times the raw gradient, and multiplies after the orthogonalisation.
OFFICIAL = {"adamw": "update", "lion": "update", "muon": "nesterov"}
# Dense() hands the step to the base.
NAMES = [
    ("muon-stepped" if (base, policy) == ("muon", "dense") else base, policy)
    for base in BASES
    if base != "muon-stepped"
    for policy in POLICIES
]

ON_EVERY_CAPTURE = ("alpha", "mgup-nesterov", "cautious", "magma", "grams")
IN_FLOAT32: list[Any] = [(base, name, "auto") for base, name in NAMES]
IN_FLOAT32 += [  # one of each kind; the others are slow
    pytest.param(base, name, "scratch", marks=[] if name in ON_EVERY_CAPTURE else pytest.mark.slow)
    for base, name in NAMES
    if base != "muon"
]
IN_FLOAT32.append(("muon-stepped", "mgup-nesterov", "scratch"))  # the others of these steps are the same in float64


ON_CAPTURES = [
    (base, name, way) for base in BASES if base != "muon" for name in ON_EVERY_CAPTURE for way in ("scratch", "delta")
]


def official(score: str) -> tuple[Policy, rules.Rule]:
    return MGUP(alpha=2, gamma=0.1, score=score), rules.mgup(alpha=2.0, gamma=0.1, score=score)  # type: ignore[arg-type]


def normal(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_params(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(normal(i, shape).to(dtype)) for i, shape in enumerate(shapes)]


def gradient(p: Tensor, index: int, step: int) -> Tensor:
    """Noise around a pull towards a target, so that a wrong step is felt in all that follow; no two are equal."""
    noise = normal(1000 * (step + 1) + index, tuple(p.shape))
    return ((0.3 * (p.double() - normal(500 + index, tuple(p.shape)))) + noise).to(p.dtype)


def coin_of(step: int, index: int, shape: tuple[int, ...]) -> rules.Coin:
    """The library's numbers by their documented address; what is done with them is the transcription's own."""

    def coin(unit: str) -> Tensor:
        rows = unit == "row" and len(shape) > 1
        view = {"tensor": (), "element": shape}.get(unit, (shape[0], *[1] * (len(shape) - 1)) if rows else shape)
        return uniform(spec.Draw(SEED, step), index, torch.Size(view).numel()).reshape(view)

    return coin


def run_free(base: str, policy: Policy, rule: rules.Rule, way: str = "auto") -> tuple[float, float]:
    """Two runs of `STEPS` in float64 that never look at each other; (largest distance, largest single update)."""
    make, write, shapes = BASES[base]
    ours = make_params(shapes, torch.float64)
    theirs = [p.detach().clone() for p in ours]
    optimizer = SelectiveUpdate(make(ours), policy=policy, seed=SEED, capture=way)  # type: ignore[arg-type]
    bases: list[written.Base] = [write(torch.float64) for _ in ours]
    kept: list[dict[str, Tensor]] = [{} for _ in ours]
    largest = distance = 0.0
    for step in range(STEPS):
        for index, p in enumerate(ours):
            p.grad = gradient(p.detach(), index, step)
            q = theirs[index]
            move = bases[index].advance(q, gradient(q, index, step))
            mask = rule(move, coin_of(step, index, shapes[index]), kept[index]).mask
            theirs[index] = move.factor * q - mask * move.update
            largest = max(largest, float(move.update.abs().max()))
        optimizer.step()
        distance = max(distance, *(float((p.detach() - q).abs().max()) for p, q in zip(ours, theirs, strict=True)))
    return distance, largest


# Parameters and gradients are of size 1: 30 steps of some ten roundings of 2^-53 each are 4e-14; the rest is room for
# what the gradients feed back. A coordinate selected differently moves the result by a learning rate, 1e-2.
CLOSE = 1e-12


def tolerance(policy: Policy, largest: float) -> float:
    # Magma's average is a float32 number by design: it may enter each step rounded, to half of 2^-23.
    return CLOSE + (STEPS * 2.0**-24 * largest if isinstance(policy, Magma) else 0.0)


@pytest.mark.parametrize("base,name", NAMES)
def test_float64_trajectories_are_the_transcriptions(base: str, name: str) -> None:
    policy, rule = POLICIES[name]
    distance, largest = run_free(base, policy, rule)
    assert largest > 5e-3  # the runs did move
    assert distance <= tolerance(policy, largest)


@pytest.mark.parametrize("base", OFFICIAL)
def test_mgup_follows_the_official_code_with_gamma_a_tenth(base: str) -> None:
    distance, _ = run_free(base, *official(OFFICIAL[base]))
    assert distance <= CLOSE


ZERO_PRODUCTS = [
    (Grams(), 0.0),  # sign(0) |u|
    (Cautious(), 0.0),  # not > 0
    (CautiousMGUP(), 2.0),  # >= 0, as in the official code
    (CautiousMGUP(strict=True), 0.5),  # > 0, as in the paper
    (AlphaConsistency(), 0.0),
    (AlphaConsistency(strict=False), 1.0),  # all agree that do not disagree: nothing to make up for
]


@pytest.mark.parametrize("way", ["fused", "scratch", "delta"])
@pytest.mark.parametrize("policy,multiplier", ZERO_PRODUCTS, ids=str)
def test_what_a_zero_gradient_counts_as(policy: Policy, multiplier: float, way: str) -> None:
    """Gradients of either zero, in a step whose update is all momentum: half of the first gradient."""
    p = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
    base = torch.optim.SGD([p], lr=1.0, momentum=0.5)
    p.grad = first = normal(1, (6,))
    base.step()
    with torch.no_grad():
        p.zero_()
    p.grad = first * torch.tensor([0.0, -0.0, 1.0, 0.0, 2.0, 0.0], dtype=torch.float64)  # the others agree
    SelectiveUpdate(base, policy=policy, capture=way).step()  # type: ignore[arg-type]
    zero = p.grad == 0
    assert torch.equal(p.detach()[zero], -multiplier * 0.5 * first[zero])  # powers of 2 and 0: exact


@pytest.mark.parametrize("base,name,way", ON_CAPTURES)
def test_every_capture_follows_the_same_transcription(base: str, name: str, way: str) -> None:
    policy, rule = POLICIES[name]
    distance, largest = run_free(base, policy, rule, way)
    assert distance <= tolerance(policy, largest)


@pytest.mark.parametrize("base,name,way", IN_FLOAT32)
def test_float32_steps_are_the_transcriptions_from_the_same_state(base: str, name: str, way: str) -> None:
    """Free runs part legitimately where rounding decides a selection. So every step starts from our float32 state, and
    a tensor whose nearest coordinate is within 16 eps of the threshold is left out: few may be."""
    policy, rule = POLICIES[name]
    make, write, shapes = BASES[base]
    params = make_params(shapes, torch.float32)
    optimizer = SelectiveUpdate(make(params), policy=policy, seed=SEED, capture=way)  # type: ignore[arg-type]
    eps, left_out = torch.finfo(torch.float32).eps, 0
    for step in range(STEPS):
        expected = []
        for index, p in enumerate(params):
            p.grad = gradient(p.detach(), index, step)
            transcribed = write(torch.float32)
            own = optimizer.state[p] if step else {}
            transcribed.load(own, step)
            kept = {"average": own["selective/state/average"].double()} if "selective/state/average" in own else {}
            move = transcribed.advance(p.detach().double(), p.grad.double())
            expected.append((p.detach().double(), move, rule(move, coin_of(step, index, shapes[index]), kept)))
        optimizer.step()
        for p, (before, move, ruled) in zip(params, expected, strict=True):
            if min(ruled.margin, move.margin) < 16 * eps:
                left_out += 1
                continue
            wanted = move.factor * before - ruled.mask * move.update
            # the parameter: its decay, the difference and the factor are rounded; the update: two moments, two bias
            # corrections, root, quotient, learning rate and mask, one rounding each
            room = eps * (1.5 * before.abs() + 8 * ruled.mask.abs() * move.size)
            worst = float(((p.detach().double() - wanted).abs() / room).max())
            assert worst <= 1, f"step {step}, shape {tuple(p.shape)}: {worst:.2f} of the rounding allowed"
    # a share of about 16 eps times the density near the threshold, for some 100 coordinates: 1 in 1,000 tensors
    assert left_out <= 0.02 * STEPS * len(shapes)
