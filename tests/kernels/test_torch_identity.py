"""The step is torch's own where the mask is 1: from the same state, to 4 eps of the larger of |p| and |u|."""

from __future__ import annotations

import pytest
import torch

from selective.kernels import (
    AdamRule,
    Draw,
    Item,
    Selection,
    SGDRule,
    Strength,
    advance,
    apply_mask,
    decay_factor,
    selective_step,
)

EPS = torch.finfo(torch.float32).eps
ADAM = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}
CASES = {
    "adamw": (torch.optim.AdamW, {**ADAM, "weight_decay": 0.1}),
    "adamw_amsgrad_maximize": (torch.optim.AdamW, {**ADAM, "amsgrad": True, "maximize": True}),
    "adam_coupled": (torch.optim.Adam, {**ADAM, "weight_decay": 0.1}),
    "adam_tensor_lr": (torch.optim.Adam, {**ADAM, "lr": torch.tensor(1e-2)}),
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd_plain": (torch.optim.SGD, {"lr": 0.1, "maximize": True}),
    "sgd_dampening": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    "sgd_nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
}


def rule_of(group):
    common = {"lr": group["lr"], "weight_decay": group["weight_decay"], "maximize": group["maximize"]}
    if "betas" not in group:
        more = {k: group[k] for k in ("momentum", "dampening", "nesterov")}
        return SGDRule(**common, **more)
    beta1, beta2 = group["betas"]
    decoupled = group["decoupled_weight_decay"]
    return AdamRule(**common, beta1=beta1, beta2=beta2, eps=group["eps"], decoupled=decoupled, amsgrad=group["amsgrad"])


def fresh(rule, param):
    if isinstance(rule, SGDRule):
        return {}
    names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if rule.amsgrad else [])]
    return {"step": torch.tensor(0.0), **{name: torch.zeros_like(param) for name in names}}


def by_mask(item, rule):
    moved = advance(item, rule)
    apply_mask(item, rule, moved.update, torch.ones(1, 1))


def by_step(backend):
    def run(item, rule):
        everything, ones = Selection("everything"), Strength("fixed")
        selective_step([item], rule=rule, selection=everything, strength=ones, draw=Draw(0, 0), backend=backend)

    return run


RUNS = {"mask": by_mask, "reference": by_step("reference"), "cpu": by_step("cpu")}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("base, options", CASES.values(), ids=CASES)
def test_twenty_steps_from_the_same_state(base, options, run):
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(30, 7, generator=generator))
    optimizer = base([param], foreach=False, **options)
    rule = rule_of(optimizer.param_groups[0])
    for step in range(20):
        param.grad = torch.randn(30, 7, generator=generator) * (1 + step)
        state = optimizer.state[param] or fresh(rule, param.detach())
        item = Item(param.detach().clone(), param.grad.clone(), {k: v.clone() for k, v in state.items()}, 0)
        start = param.detach().clone()
        optimizer.step()
        run(item, rule)
        base_update = param.detach() - start * float(decay_factor(rule))
        size = torch.maximum(start.abs(), base_update.abs())
        assert ((item.param - param.detach()).abs() <= 4 * EPS * size).all()
        for name, value in optimizer.state[param].items():
            if value is not None:  # a moment is a sum of two terms, one rounding each
                terms = value.abs() + param.grad.abs().max() ** 2 + param.grad.abs().max()
                assert ((item.state[name] - value).abs() <= 2 * EPS * terms).all()


def test_a_mask_broadcasts_and_bool_counts(make):
    rule = SGDRule(1.0)
    item = make(rule, (4, 3))
    before, moved = item.param.clone(), advance(item, rule)
    apply_mask(item, rule, moved.update, torch.tensor([[True], [False], [True], [False]]))
    assert torch.equal(item.param[1::2], before[1::2])
    assert torch.equal(item.param[::2], (before - item.grad)[::2])


def test_advance_hands_out_the_momentum_before(make):
    rule = AdamRule(1e-2, 0.9, 0.99, 1e-8)
    item = make(rule, (4, 3), torch.bfloat16)
    before = item.state["exp_avg"].clone()
    moved = advance(item, rule, keep_previous=True)
    assert torch.equal(moved.previous_momentum, before.float())
    assert moved.update.dtype == moved.grad.dtype == moved.momentum.dtype == torch.float32
    assert torch.equal(item.state["exp_avg"], moved.momentum.bfloat16())  # rounded once
    assert advance(item, rule).previous_momentum is None
    assert item.state["step"] == 5
