"""Exact top-K in two passes on the GPU path: the few elements that the pass over everything leaves to a list.

`test_gpu_top_k.py` has the same selections beside those in one pass, and ties at a threshold across blocks.
"""

from __future__ import annotations

import pytest
import torch
from gpu_support import BF16, F16, F32, assert_equal_items, copied, few_samples, gpu, made, missing_brackets

from selective.kernels import AdamRule, Decay, Draw, GivenRule, Item, LionRule, Selection, Strength, top_k
from selective.kernels.gpu import launch
from selective.kernels.gpu.configure import configure, static_key
from selective.kernels.spec import StepSpec

ADAM = AdamRule(0.5, 0.9, 0.99, 1e-8, weight_decay=0.1)
SELECTION, STRENGTH = Selection("top_k", fraction=0.3), Strength("fixed", 1.5, 0.25)


def alike(item: Item) -> None:
    """Few different scores, so that many elements are in the bin of the K-th one."""
    item.grad.copy_((item.grad * 20).round() / 4)
    for name in item.state.keys() & {"exp_avg", "exp_avg_sq", "update"}:
        item.state[name].fill_(0.5)


CASES = {
    "Adam, rounded at random": (ADAM, BF16, {"draw": Draw(7, 3, stochastic=True)}),
    "Adam, decay by the masked update": (ADAM, F16, {"decay": Decay(of="masked")}),
    "Lion, coordinates that stand still": (
        LionRule(0.5, 0.9, 0.99),
        BF16,
        {"strength": Strength("fixed", 1.0, -1.0, still=True)},
    ),
    "given": (GivenRule(factor=0.9, offset=1.0), BF16, {"strength": Strength("mean_preserving")}),
}


SLOW = ("Adam, decay by the masked update", "Lion, coordinates that stand still")


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CASES])
def test_what_is_listed_takes_the_same_step_as_all_others(case, device, monkeypatch):
    """If brackets miss, no element goes to a list. Both ways write the same bits."""
    few_samples(monkeypatch)
    rule, dtype, how = CASES[case]
    start = made(rule, (30, 50), (dtype, dtype, dtype), seed=1)
    alike(start)
    how = {"selection": SELECTION, "strength": STRENGTH, **how}
    listed, plain = copied(start, device), copied(start, device)
    sums = gpu(listed, rule, **how)
    missing_brackets(monkeypatch)
    wanted = gpu(plain, rule, **how)
    assert_equal_items([listed], [plain])
    assert sums.selected == wanted.selected == 450


def test_without_the_list_the_bin_of_the_kth_score_is_not_selected(device, monkeypatch):
    """The failing twin: the elements of that bin are written as if they were not selected, until they are ranked."""
    few_samples(monkeypatch)
    start = made(ADAM, (30, 50), (BF16, BF16, BF16), seed=1)
    alike(start)
    right, wrong = copied(start, device), copied(start, device)
    gpu(right, ADAM, selection=SELECTION, strength=STRENGTH)
    run = launch.run

    def all_but_the_last(kernel, *arguments, **constants):
        if kernel.fn.__name__ != "finish_kernel":
            run(kernel, *arguments, **constants)

    monkeypatch.setattr(launch, "run", all_but_the_last)
    gpu(wrong, ADAM, selection=SELECTION, strength=STRENGTH)
    assert not torch.equal(right.param, wrong.param)
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(right.state[name], wrong.state[name])


@pytest.mark.parametrize("like", ["normal", "NaN", "infinite", "negative"])
def test_adam_of_rounded_moments_selects_exactly_k(like, device, monkeypatch):
    """The parameter is float32 and was 0, so that it shows the update in full, and the scores that were ranked."""
    few_samples(monkeypatch)
    start = made(ADAM, (1400,), (F32, F32, BF16), seed=2)
    if like == "NaN":  # more than K are no numbers, so that a bracket without a lower end holds none
        start.grad[:1200] = torch.nan
    elif like == "infinite":
        start.grad[::2] = 1e30
    elif like == "negative":  # the K-th score is next to -0
        start.grad.copy_(-start.state["exp_avg"] * 1e-3)
        start.grad[:420] = 0
    probe, item = copied(start, device), copied(start, device)
    probe.param.zero_()
    item.param.zero_()
    gpu(probe, ADAM, selection=Selection("everything"), strength=Strength("fixed"))
    u = -probe.param
    gpu(item, ADAM, selection=SELECTION, strength=Strength("fixed", 1.0, 0.0))
    wanted = top_k((u * item.grad).cpu(), 420, backend="reference")
    shown = (u.isfinite() & (u != 0)).cpu()  # 0 times what is not finite moves, too; 0 does not show a selection
    assert torch.equal((item.param != 0).cpu() & shown, wanted & shown)


@pytest.mark.parametrize("eps, extreme", [(0.0, False), (1e-8, False), (1e-39, True), (1e39, True)])
def test_the_short_division_is_not_for_an_extreme_eps(eps, extreme):
    """1 / eps would not be a normal number of float32. Groups with and without it have kernels of their own."""
    start, rule = made(ADAM, (3,)), AdamRule(0.5, 0.9, 0.99, eps)
    spec, usual = (StepSpec(r, SELECTION, STRENGTH, Draw(0, 0), False) for r in (rule, AdamRule(0.5, 0.9, 0.99, 1e-8)))
    assert configure(start, spec).extreme_eps == extreme
    assert (static_key(spec) != static_key(usual)) == extreme


@pytest.mark.gpu
def test_the_short_division_is_the_fast_one_bit_for_bit(device):
    """For all numerators, and denominators from 2^-126 to 2^126, 0, infinity and NaN."""
    from gpu_quotients import quotients

    generator = torch.Generator("cpu").manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 22,), generator=generator, dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32)
    y = torch.exp2(torch.rand(1 << 22, generator=generator) * 252 - 126).clamp(2.0**-126, 2.0**126)
    y[:4] = torch.tensor([0.0, torch.inf, torch.nan, 2.0**-126])
    short, fast = quotients(x.to(device), y.to(device))
    assert torch.equal(short.nan_to_num(1.5), fast.nan_to_num(1.5))
    assert torch.equal(short.isnan(), fast.isnan())
