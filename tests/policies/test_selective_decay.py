"""Selective decay against float64 transcriptions, and against the two steps of which each coordinate takes one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import optimi
import pytest
import pytorch_optimizer
import torch
import transcribed_bases as written
import transcriptions as rules
from decay_problems import DECAY, LR, adamw, give_grads, parameters
from muon_products import in_a_stack
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from selective import (
    MGUP,
    AlphaConsistency,
    Cautious,
    CautiousDecay,
    Grams,
    Policy,
    SelectiveUpdate,
)
from selective.capture.job import Job
from selective.step import run

STEPS = 6
F64 = torch.float64
Make = Callable[[list[Tensor]], Optimizer]
# the base, its transcription, and the λ that the decay brings (None: the base's own)
BASES: dict[str, tuple[Make, Callable[[], written.Base], float | None, tuple[str, ...]]] = {
    "adamw": (lambda p: AdamW(p, lr=LR, weight_decay=DECAY), lambda: written.AdamW(decay=DECAY), None,
              ("fused", "scratch", "delta")),
    "adam": (lambda p: Adam(p, lr=LR), lambda: written.AdamW(decay=DECAY), DECAY, ("fused", "scratch", "delta")),
    "sgd": (lambda p: SGD(p, lr=LR, momentum=0.9), lambda: written.SGD(lr=LR, decay=0.0), DECAY,
            ("fused", "scratch", "delta")),
    "lion": (lambda p: pytorch_optimizer.Lion(p, lr=LR, weight_decay=DECAY), lambda: written.Lion(decay=DECAY), None,
             ("fused", "scratch", "delta")),
    "muon": (lambda p: torch.optim.Muon(p, lr=LR, weight_decay=DECAY),
             lambda: written.Muon(decay=DECAY, orthogonalize=in_a_stack), None, ("fused",)),
    "muon-stepped": (lambda p: torch.optim.Muon(p, lr=LR, weight_decay=DECAY), lambda: written.Muon(decay=DECAY), None,
                     ("scratch", "delta")),
}  # fmt: skip
POLICIES: dict[str, tuple[Policy | None, rules.Rule]] = {
    "none": (None, rules.dense),
    "mgup": (MGUP(), rules.mgup()),
    "cautious": (Cautious(), rules.cautious()),
    "grams": (Grams(), rules.grams),
}
WAYS = [(name, way) for name, (*_, ways) in BASES.items() for way in ways]


class HalfInPython(Policy):
    """A mask in code of its own: every other coordinate."""

    def mask(self, view):
        return (torch.arange(view.update.numel()) % 2).reshape(view.shape).to(view.dtype)


def half(move: written.Move, coin: Any, state: Any) -> rules.Ruled:
    return rules.Ruled((torch.arange(move.update.numel(), dtype=F64) % 2).reshape(move.update.shape))


POLICIES["python"] = HalfInPython(), half
ALPHA = AlphaConsistency(), rules.alpha_consistency()  # reads both momenta; only where updates come from twins


def transcribed_step(
    base: written.Base, p: Tensor, g: Tensor, rule: rules.Rule, factor: float, of: str = "update", strict: bool = False
) -> Tensor:
    """θ ← θ − (mask u + (1 − factor) 1[u' θ ≥ 0] θ), with u' the update or the masked one."""
    move = base.advance(p, g)
    mask = rule(move, lambda unit: torch.empty(0), {}).mask
    product = (mask * move.update if of == "masked" else move.update) * p
    return torch.where(product > 0 if strict else product >= 0, factor * p, p) - mask * move.update


SETTINGS: Any = (("update", False), ("masked", True), ("update", True), ("masked", False))
# each base in each capture with each policy, and each policy with each setting
CELLS = [
    pytest.param(name, way, policy, SETTINGS[(i + j) % 4], id=f"{name}-{way}-{policy}")
    for i, (name, way) in enumerate(WAYS)
    for j, policy in enumerate(POLICIES)
]


@pytest.mark.parametrize("name,way,policy,settings", CELLS)
def test_is_the_formula(name: str, way: str, policy: str, settings: tuple[Any, bool]) -> None:
    """Rates are scheduled. The tolerance is a few roundings of 2^-53 in each step, of numbers below 4."""
    make, transcription, own, _ = BASES[name]
    of, strict = settings
    params = parameters()
    wanted, bases = [p.detach().clone() for p in params], [transcription() for _ in params]
    decay = CautiousDecay(weight_decay=own, of=of, strict=strict)
    opt = SelectiveUpdate(make(params), POLICIES[policy][0], decay=decay, capture=way)  # type: ignore[arg-type]
    for step in range(STEPS):
        rate = opt.param_groups[0]["lr"] = LR / (1 + step)
        give_grads(params, step)
        opt.step()
        for i, (p, base) in enumerate(zip(params, bases, strict=True)):
            vars(base)["lr"] = rate
            wanted[i] = transcribed_step(base, wanted[i], p.grad, POLICIES[policy][1], 1 - rate * DECAY, of, strict)
            torch.testing.assert_close(p.detach(), wanted[i], rtol=0, atol=64 * 2.0**-53)


# --- each coordinate takes one of two steps ---


def twins(
    make: Callable[[list[Tensor], float], Optimizer], decay: CautiousDecay, dtype: torch.dtype, **options: Any
) -> list[tuple[SelectiveUpdate, list[Any]]]:
    """Three optimizers: with selective decay, with decay everywhere, without any."""
    made = []
    for selective, weight_decay in ((decay, DECAY), (None, DECAY), (None, 0.0)):
        params = parameters(dtype)
        made.append((SelectiveUpdate(make(params, weight_decay), decay=selective, **options), params))
    return made


def agreeing(update: Tensor, p: Tensor, strict: bool) -> Tensor:
    product = update.double().sign() * p.double().sign()
    return product > 0 if strict else product >= 0


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("rounding", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("way", ["fused", "scratch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_coordinate_takes_one_of_two_steps_bit_for_bit(
    dtype: torch.dtype, way: str, rounding: bool, strict: bool
) -> None:
    """All start each step from the same numbers; moments do not depend on them. The choice is by Adam's momentum."""
    options: dict[str, Any] = {"policy": MGUP(), "capture": way, "stochastic_rounding": rounding}
    three = twins(adamw, CautiousDecay(strict=strict), dtype, **options)
    chosen = 0
    for step in range(STEPS):
        before = [p.detach().clone() for p in three[0][1]]
        for opt, params in three:
            for p, start in zip(params, before, strict=True):
                p.data.copy_(start)
            give_grads(params, step)
            opt.step()
        opt = three[0][0]
        for p, full, none, start in zip(*(params for _, params in three), before, strict=True):
            decays = agreeing(opt.base.state[p]["exp_avg"], start, strict)
            assert torch.equal(p, torch.where(decays, full, none))
            chosen += int((full != none)[decays].sum())
    assert chosen > 50  # the two steps differ, and both are taken


@pytest.mark.filterwarnings("ignore:.*decays nothing:UserWarning")
@pytest.mark.parametrize("way", ["fused", "scratch", "delta"])
def test_a_decay_of_zero_is_no_decay(way: str) -> None:
    ends = []
    for decay in (CautiousDecay(), CautiousDecay(weight_decay=0.0), None):
        params = parameters(torch.float32)
        opt = SelectiveUpdate(adamw(params, 0.0), MGUP(), decay=decay, capture=way)  # type: ignore[arg-type]
        for step in range(STEPS):
            give_grads(params, step)
            opt.step()
        ends.append([p.detach().clone() for p in params])
    for mine, without in ((ends[0], ends[2]), (ends[1], ends[2])):
        for a, b in zip(mine, without, strict=True):
            # delta starts from the value before the step, not from the one after it: a rounding of numbers below 4
            torch.testing.assert_close(a, b, rtol=0, atol=STEPS * 4 * 2.0**-24 if way == "delta" else 0)


# --- where the update is 0 ---


@pytest.mark.parametrize("name,way", WAYS)
@pytest.mark.parametrize("strict", [False, True])
def test_where_the_update_is_zero_strictness_decides(name: str, way: str, strict: bool) -> None:
    make, _, own, _ = BASES[name]
    if name.startswith("muon"):
        pytest.skip("its update has no zeros")
    params = parameters(torch.float32)
    start, grown = params[0].detach()[:3].clone(), params[0].detach()[:3].clone()
    decay = CautiousDecay(weight_decay=own, strict=strict)
    opt = SelectiveUpdate(make(params), MGUP(), decay=decay, capture=way)  # type: ignore[arg-type]
    for step in range(STEPS):
        give_grads(params, step)
        opt.step()
        grown *= 1 - LR * DECAY
    if strict:
        assert torch.equal(params[0].detach()[:3], start)
    else:
        torch.testing.assert_close(params[0].detach()[:3], grown, rtol=STEPS * 2.0**-23, atol=0)


def test_rounding_would_decide_if_the_base_decayed_in_a_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    """The failing twin: let the base decay, and the differences where the update is 0 are rounding errors."""

    def strict_rows() -> tuple[Tensor, Tensor]:
        params = parameters(torch.float32)
        start = params[0].detach()[:3].clone()
        opt = SelectiveUpdate(adamw(params, DECAY), decay=CautiousDecay(strict=True), capture="delta")
        give_grads(params, 0)
        opt.step()
        return params[0].detach()[:3], start

    assert torch.equal(*strict_rows())
    monkeypatch.setattr(run, "bases_without_decay", lambda jobs: nullcontext())
    assert not torch.equal(*strict_rows())


def test_masked_coordinates_decay_by_strictness() -> None:
    for strict in (False, True):
        params = parameters(torch.float32)
        before = [p.detach().clone() for p in params]
        opt = SelectiveUpdate(adamw(params, DECAY), HalfInPython(), decay=CautiousDecay(of="masked", strict=strict))
        give_grads(params, 0)
        opt.step()
        for p, start in zip(params, before, strict=True):
            out = start.flatten()[::2]
            torch.testing.assert_close(p.detach().flatten()[::2], out if strict else out * (1 - LR * DECAY))


@pytest.mark.parametrize("fails", [False, True])
def test_the_base_has_its_decay_back(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(torch.float32)
    opt = SelectiveUpdate(adamw(params, DECAY), decay=CautiousDecay(), capture="delta")
    seen: list[float] = []

    def in_the_step(base: Optimizer, *arguments: Any) -> None:
        seen.append(base.param_groups[0]["weight_decay"])
        if fails:
            raise RuntimeError("stop")

    monkeypatch.setattr(run, "run_step_on", in_the_step)
    give_grads(params, 0)
    with pytest.raises(RuntimeError, match="stop") if fails else nullcontext():
        opt.step()
    assert seen == [0.0]
    assert opt.param_groups[0]["weight_decay"] == DECAY


# --- precision, signs, rotations ---


@pytest.mark.parametrize("make", [optimi.AdamW, pytorch_optimizer.StableAdamW], ids=["optimi", "stable"])
def test_low_precision_parameters_with_a_residue(make: Any) -> None:
    """Delta capture in bfloat16 with Kahan sums follows the float32 run to the precision of the residue, 2^-16."""
    ends = []
    for dtype in (torch.bfloat16, torch.float32):
        params = [torch.nn.Parameter(p.detach().bfloat16().to(dtype)) for p in parameters()]
        base = make(params, lr=LR, weight_decay=DECAY, **({"kahan_sum": True} if dtype == torch.bfloat16 else {}))
        opt = SelectiveUpdate(base, MGUP(), decay=CautiousDecay(strict=True), capture="delta")
        for step in range(STEPS):
            give_grads(params, step)
            for p in params:
                p.grad = p.grad.bfloat16().to(dtype)
            opt.step()
        ends.append([p.detach().float() for p in params])
    for low, exact in zip(*ends, strict=True):
        torch.testing.assert_close(low, exact, rtol=0, atol=4 * 2.0**-9 + STEPS * 4 * 2.0**-16)


@pytest.mark.parametrize("way", ["fused", "scratch", "delta"])
def test_a_negative_learning_rate_takes_the_formula_as_it_is(way: str) -> None:
    """θ ← θ − lr (u + λ 1[u θ ≥ 0] θ): u is the direction, without the rate and its sign."""
    params = parameters()
    opt = SelectiveUpdate(SGD(params, lr=LR), decay=CautiousDecay(weight_decay=DECAY), capture=way)  # type: ignore[arg-type]
    opt.param_groups[0]["lr"] = -LR
    give_grads(params, 0)
    wanted = [p.detach() + LR * (p.grad + DECAY * (p.grad * p.detach() >= 0) * p.detach()) for p in params]
    opt.step()
    for p, w in zip(params, wanted, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=0, atol=16 * 2.0**-53)


ROTATED = [(name, way) for name, way in WAYS if name not in ("adam", "muon", "muon-stepped")]
SPACES = [("update", "rotated"), ("masked", "rotated"), ("update", "original")]
MASKS = ["none", "mgup", "cautious", "python", "alpha"]
ROTATED_CELLS = [  # in the ordinary suite each capture of each base, policies and spaces in turn
    pytest.param(
        name, way, policy, *SPACES[k], id=f"{name}-{way}-{policy}-{'-'.join(SPACES[k])}",
        marks=[] if (j, k) == ((i + i // 3 + 1) % 5, i % 3) else pytest.mark.slow,
    )
    for i, (name, way) in enumerate(ROTATED) for j, policy in enumerate(MASKS) for k in range(3)
]  # fmt: skip


@pytest.mark.parametrize("name,way,policy,of,space", ROTATED_CELLS)
def test_rotated_parameters_decay_by_the_update_in_their_own_space(
    name: str, way: Any, policy: str, of: Any, space: Any
) -> None:
    """Updates come from twins without decay that step zeros: there is nothing else in what they leave.

    Rotations are in float32. Coordinates whose update is within 1e-5 of 0, relative to the largest, are left out.
    """
    make, _, own, _ = BASES[name]
    rule = {**POLICIES, "alpha": ALPHA}[policy][0]
    options: dict[str, Any] = {"capture": way, "preconditioner": "Soap", "mask_space": space}
    decay = CautiousDecay(weight_decay=own, of=of)
    runs = [(decay, rule), (None, rule), (None, None)]
    made = []
    for selective, mask in runs:
        params = parameters(torch.float32)
        base = make(params)
        if selective is None:
            base.param_groups[0]["weight_decay"] = 0.0
        made.append((SelectiveUpdate(base, mask, decay=selective, **options), params))
    compared = 0
    for step in range(STEPS):
        before = [p.detach().clone() for p in made[0][1]]
        for opt, params in made:
            if opt is not made[0][0]:
                for p in params:
                    p.data.zero_()
            give_grads(params, step)
            opt.step()
        for p, masked, dense, start in zip(*(params for _, params in made), before, strict=True):
            update = -(dense if of == "update" else masked).detach()
            decays = update * start >= 0
            if step == 0:  # SOAP only makes its bases
                assert torch.equal(p, start)
                continue
            wanted = torch.where(decays, (1 - LR * DECAY) * start, start) + masked.detach()
            clear = (update.abs() > 1e-5 * update.abs().max()) | (update == 0)
            torch.testing.assert_close(p.detach()[clear], wanted[clear], rtol=0, atol=16 * 2.0**-23)
            compared += int(clear.sum())
    assert compared > 0.9 * (STEPS - 1) * sum(p.numel() for p in made[0][1])


def test_jobs_without_a_decay_have_none() -> None:
    """Nothing of this runs for who does not use it."""
    params = parameters(torch.float32)
    opt = SelectiveUpdate(adamw(params, DECAY), MGUP())
    give_grads(params, 0)
    opt.step()
    jobs: list[Job] = opt.runner.jobs(
        opt.groups, [plan.params.with_gradient() for plan in opt.groups.plans], None, False
    )
    assert [job.decay for job in jobs] == [None]
