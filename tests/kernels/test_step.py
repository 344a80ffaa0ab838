"""Rules × selections × strengths × dtypes, on both implementations, against the float64 transcription."""

from __future__ import annotations

import pytest
import torch
from step_cases import RULES, SELECTIONS, STRENGTHS, needs_momentum

from selective.kernels import AdamRule, Draw, GivenRule, Selection, SGDRule, Strength, selective_step

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def assert_close(got, wanted, scale, what, single=False):
    """One rounding to the stored dtype (half an ulp, or a whole one where float32 lands on the other side), and what
    the arithmetic before it loses: some ten operations, each half an eps of the largest term."""
    working = torch.finfo(torch.float64 if got.dtype == torch.float64 and not single else torch.float32).eps
    stored = torch.finfo(got.dtype).eps
    smallest = torch.finfo(got.dtype).tiny * stored  # fp16: the spacing of what is subnormal
    bound = 16 * working * scale + (stored if stored > working else 0) * wanted.abs() + smallest
    error = (got.to(torch.float64) - wanted).abs()
    assert (error <= bound).all(), f"{what}: off by {float((error / bound).max()):.3g} of the bound"


@pytest.mark.parametrize("turn", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_agrees_with_the_transcription(rule, selection, dtype, turn, transcription, make, copy, small_chunks):
    """Every second strength, others for each dtype and for each rule; the rest is slow."""
    first = (DTYPES.index(dtype) + list(RULES.values()).index(rule) + turn) % 2
    tried = 0
    for number, (name, strength) in list(enumerate(STRENGTHS.items()))[first::2]:
        start, draw = make(rule, (6, 11), dtype, seed=number), Draw(7, number)
        if isinstance(rule, SGDRule) and rule.momentum == 0 and needs_momentum(selection, strength):
            before = start.param.clone()
            with pytest.raises(ValueError, match="needs a momentum, and SGDRule has none for parameter 5"):
                selective_step([start], rule=rule, selection=selection, strength=strength, draw=draw)
            assert torch.equal(start.param, before)
            tried += 1
            continue
        wanted, state, sums, average = transcription.step(
            rule, selection, strength, draw, start.param, start.grad, start.state, start.address
        )
        for backend in ("reference", "cpu"):
            item, what = copy(start), f"{name} {backend}"
            (got,) = selective_step(
                [item], rule=rule, selection=selection, strength=strength, draw=draw, statistics=True, backend=backend
            )
            size = torch.maximum(start.param.abs(), wanted.abs()).to(torch.float64) + (start.param - wanted).abs()
            # the alignment's average is kept in float32 whatever the parameter's dtype
            assert_close(item.param, wanted, size, what, single=strength.kind == "alignment")
            for key, value in item.state.items():
                terms = state[key].abs() + start.grad.abs().to(torch.float64).max()
                assert_close(value, state[key], terms, f"{what} {key}")
            assert got.numel == 66
            for key, value in sums.items():
                # dot products of float32 chunks of numbers that are exact to some eps: 40 eps of the terms' size
                terms = abs(value) if key != "update_grad" else (sums["update_sq"] * sums["grad_sq"]) ** 0.5
                assert abs(float(getattr(got, key)) - value) <= 5e-6 * terms, f"{what} {key}"
            if strength.kind == "alignment":
                assert float(item.policy_state["average"]) == pytest.approx(average, rel=1e-6)
            tried += 1
    assert tried >= 2


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_first_step_of_previous_momentum_is_dense(backend, make):
    rule = AdamRule(1e-2, 0.9, 0.99, 1e-8)
    item = make(rule, (40,))
    item.state["exp_avg"].zero_()
    kw = {"rule": rule, "selection": Selection("agreement", product="previous_momentum"), "backend": backend}
    results = []
    for i in range(2):
        results.append(selective_step([item], strength=Strength("fixed"), draw=Draw(0, i), statistics=True, **kw))
        item.grad[::3] *= -1
    assert results[0][0].selected == 40
    assert 0 < results[1][0].selected < 40


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    "strength", [s for s in STRENGTHS.values() if s.kind in ("mean_preserving", "norm_preserving")]
)
def test_where_nothing_is_selected_the_strength_is_one(strength, backend, make):
    rule = AdamRule(0.0, 0.9, 0.99, 1e-8)  # a learning rate of 0: every product is 0
    (sums,) = selective_step(
        [make(rule, (40,))], rule=rule, selection=Selection("agreement"), strength=strength, draw=Draw(0, 0),
        statistics=True, backend=backend,
    )  # fmt: skip
    assert sums.selected == 0
    assert sums.strength_selected == 1
    assert sums.strength_rest == strength.rest


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_nan_is_not_selected_and_stays_where_it_is(backend, make):
    rule = AdamRule(1e-2, 0.9, 0.99, 1e-8)
    for selection in (Selection("agreement", strict=False), Selection("top_k", fraction=1.0)):
        item = make(rule, (40,))
        item.grad[7] = torch.nan
        (sums,) = selective_step(
            [item], rule=rule, selection=selection, strength=Strength("fixed", 1.0, 1.0), draw=Draw(0, 0),
            statistics=True, backend=backend,
        )  # fmt: skip
        assert item.param.isnan().nonzero().tolist() == [[7]]
        assert sums.selected <= 39
        if selection.kind == "top_k":
            assert sums.selected == 39


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_delta_with_a_mask_of_one_is_exactly_the_base(backend, make):
    """offset - mask is 0 there, whatever rounding the other multiplier would bring (0.9 + 0.1 in float32)."""
    rule = GivenRule(offset=1.0)
    item = make(rule, (1000,))
    item.state["start"] = item.param  # as delta capture has it: the parameter after the base's step
    before, update = item.param.clone(), item.state["update"].clone()
    selective_step(
        [item], rule=rule, selection=Selection("agreement"), strength=Strength("fixed", 1.0, 0.1), draw=Draw(0, 0),
        backend=backend,
    )  # fmt: skip
    chosen = update * item.grad > 0
    assert 300 < chosen.sum() < 700
    assert torch.equal(item.param[chosen], before[chosen])
    assert (item.param != before)[~chosen].float().mean() > 0.99


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("negated", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_given_update_may_lie_in_the_parameter(backend, negated, selection, make, copy, small_chunks):
    rule = GivenRule(factor=0.9, negated=negated)
    for strength in STRENGTHS.values():
        apart = make(rule, (9, 10))
        apart.param.copy_(apart.state["update"])
        shared = copy(apart)
        shared.state["update"] = shared.param
        kw = {"rule": rule, "selection": selection, "strength": strength, "draw": Draw(1, 2), "backend": backend}
        a, b = (selective_step([item], statistics=True, **kw) for item in (apart, shared))
        assert torch.equal(apart.param, shared.param)
        assert a == b
