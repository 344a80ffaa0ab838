"""Every rule × selection, with strengths and dtypes in turn, by the GPU path: against the reference and float64."""

from __future__ import annotations

import pytest
import torch
from gpu_support import (
    BF16,
    CUDA,
    DTYPES,
    F32,
    assert_equal_items,
    assert_same_step,
    assert_same_sums,
    bound_of,
    copied,
    few_samples,
    gpu,
    made,
    reference,
    rule_on,
)
from step_cases import RULES, SELECTIONS, STRENGTHS, needs_momentum

from selective.kernels import AdamRule, Draw, GivenRule, Item, Selection, SGDRule, Strength, selective_step
from selective.kernels.gpu import configure

ADAM = RULES["adamw"]
# Each pair of rule, selection, strength and dtypes is in some cell: 2, 3 and 1 have no factor in common with 9 and 8.
CELLS = [
    (rule, selection, list(STRENGTHS)[(2 * i + j) % 9], list(DTYPES)[(i + 3 * j) % 8])
    for i, rule in enumerate(RULES)
    for j, selection in enumerate(SELECTIONS)
]


def impossible(rule, selection, strength) -> bool:
    return isinstance(rule, SGDRule) and rule.momentum == 0 and needs_momentum(selection, strength)


def assert_no_worse(start, got, wanted, exact, state, what):
    """Against float64: the root mean square error is at most twice the reference's. Both round the same operations to
    float32 once each, of which the reference fuses some multiply-adds: that saves it every other rounding at most."""
    bound = bound_of(start, wanted)
    pairs = [("parameter", got.param, wanted.param, exact, bound)]
    for key, value in wanted.state.items():
        if key != "step" and value.dtype == F32:
            size = torch.maximum(start.state.get(key, start.grad).abs().double(), value.double().abs())
            pairs.append((key, got.state[key], value, state[key], size.clamp(min=1e-30)))
    for name, a, b, truth, size in pairs:
        ours, theirs = (float(((x.cpu().double() - truth) / size).square().mean().sqrt()) for x in (a, b))
        assert ours <= 2 * theirs, f"{what} {name}: an error of {ours:.3g}, the reference's is {theirs:.3g}"


def agrees(rule, selection, strength, dtypes, shape, seed, device, transcription, what=""):
    """One step from one start by all three: returns nothing, asserts everything."""
    start, how = made(rule, shape, dtypes, seed=seed), {"selection": selection, "strength": strength}
    item = copied(start, device)
    sums = gpu(item, rule, **how)
    twin, wanted = reference(start, rule, **how)
    assert_same_step(start, item, twin, what)
    assert_same_sums(sums, wanted, what)
    exact, state, by_hand, _ = transcription.step(
        rule, selection, strength, Draw(7, 3), start.param, start.grad, start.state, start.address
    )
    assert float(sums.selected) == by_hand["selected"]
    assert_no_worse(start, item, twin, exact, state, what)


def test_every_pair_is_tried():
    for a in range(4):
        for b in range(a):
            pairs = {(cell[a], cell[b]) for cell in CELLS}
            assert len(pairs) == len({cell[a] for cell in CELLS}) * len({cell[b] for cell in CELLS})


@pytest.mark.parametrize("rule, selection, strength, dtypes", CELLS)
def test_is_the_reference_and_near_float64(rule, selection, strength, dtypes, device, monkeypatch, transcription):
    """A small tensor, and one whose scores are ranked by a bracket; SGD in its first step and later.

    Where nothing is ranked, one of the two: the other is tried with the next strength and dtypes.
    """
    few_samples(monkeypatch)
    parity = CELLS.index((rule, selection, strength, dtypes)) % 2
    how = (RULES[rule], SELECTIONS[selection], STRENGTHS[strength])
    if impossible(*how):
        with pytest.raises(ValueError, match="needs a momentum, and SGDRule has none"):
            gpu(copied(made(how[0], (9,)), device), how[0], selection=how[1], strength=how[2])
        return
    starts = [((11, 71), parity), ((2, 1250), 1 - parity)]
    for shape, seed in starts if CUDA or how[1].kind == "top_k" else starts[parity:][:1]:
        agrees(*how, DTYPES[dtypes], shape, seed, device, transcription, str(shape))


@pytest.mark.slow
@pytest.mark.skipif(CUDA, reason="thousands of kernels to compile; interpreted, they are the same")
@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_combination(rule, selection, device, transcription):
    for i, (strength_name, strength) in enumerate(STRENGTHS.items()):
        for j, (name, dtypes) in enumerate(DTYPES.items()):
            if not impossible(rule, selection, strength):
                what = f"{strength_name} {name}"
                agrees(rule, selection, strength, dtypes, (11, 71), i + j, device, transcription, what)


@pytest.mark.gpu
@pytest.mark.parametrize("strength", ["fixed", "norm_update"])
@pytest.mark.parametrize("selection", ["update", "top_update", "top_sampled", "element"])
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "bf16+f32"])
@pytest.mark.parametrize("rule", ["adamw", "lion", "sgd_nesterov", "scratch"])
def test_real_sizes(rule, dtypes, selection, strength, device):
    rule, how = RULES[rule], {"selection": SELECTIONS[selection], "strength": STRENGTHS[strength]}
    start = made(rule, (1500, 1111), DTYPES[dtypes], seed=1)
    item = copied(start, device)
    sums = gpu(item, rule, **how)
    twin, wanted = reference(start, rule, **how)
    # Of a million scores, some are within rounding of the K-th, and of as many numbers of few digits, some cancel.
    assert abs(float(sums.selected) - float(wanted.selected)) <= 2
    off = (item.param.cpu().double() - twin.param.double()).abs() > bound_of(start, twin, rule)
    assert int(off.sum()) <= 4


@pytest.mark.parametrize("place, selection", list(enumerate(SELECTIONS.values())), ids=SELECTIONS)
@pytest.mark.parametrize("turn", [0, pytest.param(1, marks=[] if CUDA else pytest.mark.slow)])
def test_a_given_update_may_lie_in_the_parameter(turn, place, selection, device, monkeypatch):
    """Negated or not, in turns."""
    few_samples(monkeypatch)
    negated = bool((place + turn) % 2)
    rule, strength = GivenRule(factor=0.9, negated=negated), Strength("norm_preserving", rest=0.25)
    apart = made(rule, (2300,))
    apart.param.copy_(apart.state["update"])
    shared = copied(apart)
    shared.state["update"] = shared.param
    apart, shared = copied(apart, device), copied(shared, device)
    assert shared.state["update"] is shared.param
    a, b = (gpu(item, rule, selection=selection, strength=strength) for item in (apart, shared))
    assert torch.equal(apart.param, shared.param)
    assert a == b


def test_delta_with_a_mask_of_one_is_exactly_the_base(device):
    rule = GivenRule(offset=1.0)
    start = made(rule, (1000,))
    start.state["start"] = start.param  # as delta capture has it: the parameter after the base's step
    item = copied(start, device)
    gpu(item, rule, selection=Selection("agreement"), strength=Strength("fixed", 1.0, 0.1))
    chosen = start.state["update"] * start.grad > 0
    assert torch.equal(item.param.cpu()[chosen], start.param[chosen])
    assert (item.param.cpu() != start.param)[~chosen].float().mean() > 0.99


def test_the_first_step_of_previous_momentum_is_dense(device):
    item = copied(made(ADAM, (2300,)), device)
    item.state["exp_avg"].zero_()
    how = {"selection": Selection("agreement", product="previous_momentum"), "strength": Strength("fixed")}
    assert gpu(item, ADAM, **how).selected == 2300
    item.grad[::3] *= -1
    assert 0 < gpu(item, ADAM, **how).selected < 2300


@pytest.mark.parametrize("strength", ["mean", "mean_sampled", "norm_update", "norm_gradient"])
def test_where_nothing_is_selected_the_strength_is_one(strength, device):
    rule, strength = AdamRule(0.0, 0.9, 0.99, 1e-8), STRENGTHS[strength]  # a rate of 0: every product is 0
    sums = gpu(copied(made(rule, (40,)), device), rule, selection=Selection("agreement"), strength=strength)
    assert (sums.selected, sums.strength_selected) == (0, 1)
    assert float(sums.strength_rest) == pytest.approx(strength.rest, rel=1e-7)


@pytest.mark.parametrize("selection", ["update_loose", "momentum_loose", "top_update", "top_momentum", "top_sampled"])
def test_nan_is_not_selected_and_stays_where_it_is(selection, device, monkeypatch):
    few_samples(monkeypatch)
    for numel in (40, 2300):
        start = made(ADAM, (numel,))
        start.grad[7] = torch.nan
        start.state["exp_avg"][11] = torch.nan
        item = copied(start, device)
        how = {"selection": SELECTIONS[selection], "strength": Strength("fixed", 2.0, 0.5)}
        sums = gpu(item, ADAM, **how)
        twin, wanted = reference(start, ADAM, **how)
        assert item.param.isnan().nonzero().tolist() == [[7], [11]]
        assert_same_step(start, item, twin)
        assert sums.selected == wanted.selected


def test_lion_does_not_move_where_the_gradient_is_no_number(device):
    """torch's sign of NaN is 0: the parameter stays, and its momentum is NaN from then on."""
    rule = RULES["lion"]
    start = made(rule, (40,))
    start.grad[7] = torch.nan
    item, how = copied(start, device), {"selection": Selection("everything"), "strength": Strength("fixed")}
    gpu(item, rule, **how)
    twin, _ = reference(start, rule, **how)
    assert_same_step(start, item, twin)
    assert item.param.isfinite().all() and item.state["exp_avg"].isnan().nonzero().tolist() == [[7]]


def test_a_dense_tensor_is_not_still(device):
    """K = 0: every multiplier is 1, also where the gradient is 0 (and the update is not)."""
    start = made(ADAM, (40,))
    start.grad[::3] = 0
    item, how = copied(start, device), {"selection": Selection("top_k", fraction=0.01), "strength": STRENGTHS["still"]}
    sums = gpu(item, ADAM, **how)
    twin, wanted = reference(start, ADAM, **how)
    assert_same_step(start, item, twin)
    assert_same_sums(sums, wanted)


def test_no_statistics_is_the_same_step(device, monkeypatch):
    few_samples(monkeypatch)
    for strength in (Strength("fixed", 2.0, 0.5), Strength("norm_preserving")):
        for selection in (Selection("top_k"), Selection("agreement")):
            with_sums = copied(made(ADAM, (2300,)), device)
            without = copied(with_sums)
            how = {"selection": selection, "strength": strength, "draw": Draw(7, 3)}
            gpu(with_sums, ADAM, **how)
            assert selective_step([without], rule=rule_on(ADAM, device), backend="gpu", **how) is None
            assert torch.equal(with_sums.param, without.param)


def test_an_empty_list_and_an_empty_tensor(device):
    how = {"rule": ADAM, "selection": Selection("top_k"), "strength": Strength("mean_preserving"), "draw": Draw(0, 0)}
    assert list(selective_step([], statistics=True, backend="gpu", **how)) == []
    empty = Item(torch.zeros(0, 3, dtype=BF16, device=device), torch.zeros(0, 3, dtype=BF16, device=device),
                 {"step": torch.tensor(2.0), "exp_avg": torch.zeros(0, 3, device=device),
                  "exp_avg_sq": torch.zeros(0, 3, device=device)}, 0)  # fmt: skip
    sums = gpu(empty, ADAM, selection=Selection("top_k"), strength=Strength("mean_preserving"))
    assert (sums.selected, sums.update_sq, empty.state["step"]) == (0, 0, 3)


@pytest.mark.slow
@pytest.mark.parametrize("strength", ["fixed", "mean", "norm_update"])
@pytest.mark.parametrize("selection", ["update", "top_update"])
def test_the_size_of_a_block_of_16_bits_changes_no_bit(selection, strength, device, monkeypatch):
    """Of parameter and moments; the sums of statistics are rounded otherwise."""
    few_samples(monkeypatch)
    start, how = made(ADAM, (5000,), (BF16, BF16, BF16), seed=1), {"selection": SELECTIONS[selection]}
    items = []
    for block in (1024, 2048):
        monkeypatch.setattr(configure, "BLOCK_OF_16_BITS", block)
        items.append(copied(start, device))
        gpu(items[-1], ADAM, strength=STRENGTHS[strength], **how)
    assert_equal_items(items[:1], items[1:])
