"""Extreme numbers, hyper-parameters and step counters on the GPU path; and what it refuses."""

from __future__ import annotations

import pytest
import torch
from gpu_support import (
    BF16,
    CUDA,
    assert_same_step,
    copied,
    few_samples,
    gpu,
    made,
    reference,
)
from step_cases import RULES, STRENGTHS

from selective.kernels import (
    AdamRule,
    Draw,
    GivenRule,
    Item,
    LionRule,
    Selection,
    SGDRule,
    Strength,
    selective_step,
    top_k,
)
from selective.kernels._dispatch import why_reference

ADAM = RULES["adamw"]


@pytest.mark.parametrize("bad", [1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("strength", ["norm_update", "norm_momentum", "norm_gradient", "alignment", "mean"])
def test_one_bad_gradient_leaves_the_other_coordinates_alone(strength, bad, device):
    rule, strength = SGDRule(0.5, 0.9), STRENGTHS[strength]
    grad = torch.ones(40)
    grad[3] = bad
    start = Item(torch.zeros(40), grad, {}, 0, {"average": torch.ones(())})
    item = copied(start, device)
    how = {"selection": Selection("agreement"), "strength": strength}
    sums = gpu(item, rule, **how)
    twin, wanted = reference(start, rule, **how)
    assert_same_step(start, item, twin)
    assert item.param.cpu()[[0, 1, 2, *range(4, 40)]].isfinite().all()
    assert float(sums.strength_selected) == pytest.approx(float(wanted.strength_selected), rel=1e-6)


SCORES = [Selection("agreement"), Selection("top_k"), Selection("top_k", score="momentum")]


@pytest.mark.parametrize("selection", SCORES)
@pytest.mark.parametrize("scale", [1e-12, 1e15, 1e20])
def test_gradients_of_any_size(scale, selection, device, monkeypatch):
    """Squares that vanish or overflow, scores that overflow: as in the reference."""
    few_samples(monkeypatch)
    for rule in (SGDRule(0.5, 0.5), LionRule(0.5, 0.5, 0.5), AdamRule(0.5, 0.5, 0.75, 1e-8)):
        start = made(rule, (700,), seed=1)
        start.param.zero_()
        start.grad *= scale
        for key in start.state.keys() & {"exp_avg", "exp_avg_sq", "momentum_buffer"}:
            start.state[key].zero_()
        how = {"selection": selection, "strength": Strength("fixed", 1.0, 0.5)}
        item = copied(start, device)
        sums = gpu(item, rule, **how)
        twin, wanted = reference(start, rule, **how)
        assert sums.selected == wanted.selected, type(rule).__name__
        assert_same_step(start, item, twin, type(rule).__name__)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("strict", [True, False])
def test_an_update_that_is_zero_or_nan_does_not_agree(strict, value, device):
    """Adam's is, whatever its momentum, where the second moment is infinite or NaN."""
    start = made(ADAM, (40,))
    start.state["exp_avg"].copy_(start.grad)
    start.state["exp_avg_sq"][7] = value
    item, how = (
        copied(start, device),
        {"selection": Selection("agreement", strict=strict), "strength": Strength("fixed", 2.0, 0.5)},
    )
    sums = gpu(item, ADAM, **how)
    twin, wanted = reference(start, ADAM, **how)
    assert sums.selected == wanted.selected
    assert_same_step(start, item, twin)


def test_a_share_counts_adams_momentum(device):
    """A strength's sums don't read the second moment, so an infinite one leaves the share as it is."""
    start = made(ADAM, (40,))
    start.state["exp_avg"].copy_(start.grad)
    healthy = copied(start, device)
    start.state["exp_avg_sq"][7] = torch.inf
    how = {"selection": Selection("agreement"), "strength": STRENGTHS["mean"]}
    usual, sums = gpu(healthy, ADAM, **how), gpu(copied(start, device), ADAM, **how)
    assert (usual.selected, sums.selected) == (40, 39)
    assert sums.strength_selected == usual.strength_selected


def test_denormal_numbers_are_numbers(device):
    """An update of a few 1e-45 is subtracted, a product of signs that underflows agrees, a score of 1e-45 ranks."""
    tiny = torch.tensor([1, -2, 3, 0, -5] * 60).float() * 1.4e-45
    start = Item(torch.zeros(300), tiny.sign() * 1e-30, {"update": tiny, "start": torch.zeros(300)}, 0)
    item = copied(start, device)
    sums = gpu(item, GivenRule(), selection=Selection("agreement"), strength=Strength("fixed"))
    assert sums.selected == 240
    assert torch.equal(item.param.cpu(), -tiny)
    assert torch.equal(top_k(tiny.to(device), 60, backend="gpu").cpu(), tiny == tiny.max())


@pytest.mark.parametrize("on_device", [False, True])
def test_hyper_parameters_may_be_tensors(on_device, device):
    def number(x: float) -> torch.Tensor:
        return torch.tensor(x, dtype=torch.float64, device=device if on_device else "cpu")

    pairs = [
        (AdamRule(number(1e-2), number(0.9), number(0.99), 1e-8, 0.1), AdamRule(1e-2, 0.9, 0.99, 1e-8, 0.1)),
        (AdamRule(number(1e-2), 0.9, 0.99, 1e-8, 0.1, decoupled=False), AdamRule(1e-2, 0.9, 0.99, 1e-8, 0.1, False)),
        (SGDRule(number(0.1), 0.9), SGDRule(0.1, 0.9)),
        (LionRule(number(0.1), number(0.9), number(0.99), number(0.875)), LionRule(0.1, 0.9, 0.99, 0.875)),
        (GivenRule(factor=number(0.875), negated=True), GivenRule(factor=0.875, negated=True)),
    ]
    for as_tensors, as_numbers in pairs:
        items = [copied(made(as_numbers, (300,), seed=1), device) for _ in range(2)]
        how = {"selection": Selection("top_k"), "strength": Strength("norm_preserving"), "draw": Draw(0, 0)}
        for item, rule in zip(items, (as_tensors, as_numbers), strict=True):
            selective_step([item], rule=rule, backend="gpu", **how)
        assert torch.equal(items[0].param, items[1].param)


@pytest.mark.parametrize("count", [0, 1, 999, 100_000])
def test_steps_are_counted_and_corrected_for(count, device):
    """On the host and, where there is one, on the GPU; bias corrections in float64 all the same."""
    start = made(ADAM, (300,))
    start.state["step"].fill_(count)
    how = {"selection": Selection("agreement"), "strength": Strength("fixed", 1.0, 0.5)}
    twin, _ = reference(start, ADAM, **how)
    for where in {"cpu", device}:
        item = copied(start, device)
        item.state["step"] = item.state["step"].to(where)
        gpu(item, ADAM, **how)
        assert float(item.state["step"]) == count + 1
        item.state["step"] = item.state["step"].cpu()
        assert_same_step(start, item, twin)


def test_what_the_kernels_do_not_take(device):
    """Float64, another device, a strange tensor: said why, refused by "gpu", stepped all the same by "auto"."""

    class Strange(torch.Tensor):
        pass

    how = {"selection": Selection("agreement"), "strength": Strength("fixed"), "draw": Draw(0, 0)}

    def changed(**parts) -> Item:
        item = copied(made(ADAM, (6, 5)), device)
        for key, value in parts.items():
            if key in ("param", "grad"):
                setattr(item, key, value)
            else:
                item.state[key] = value
        return item

    double, usual = torch.ones(6, 5, dtype=torch.float64, device=device), torch.ones(6, 5, device=device)
    cases = [
        ({"param": double}, "parameter is float64"),
        ({"grad": double}, "gradient is float64"),
        ({"exp_avg_sq": double}, "state column 1 is float64"),
        ({"exp_avg": torch.ones(6, 5, device="meta")}, "state column 0 is on meta"),
        ({"exp_avg": torch.ones(30, device=device)}, r"state column 0 has shape \(30,\)"),
        ({"param": usual.as_subclass(Strange)}, "parameter is a Strange"),
    ]
    if CUDA:
        cases.append(({"step": torch.tensor(3.0, dtype=torch.float64, device=device)}, "step counter is float64"))
    for parts, reason in cases:
        with pytest.raises(
            ValueError, match=f"backend 'gpu' can't take parameter 5: the {reason}; pass backend='auto'"
        ):
            selective_step([changed(**parts)], rule=ADAM, backend="gpu", **how)
        assert why_reference(changed(**parts), ADAM) is not None
    assert why_reference(changed(), ADAM) is None
    for parts in ({"param": double}, {"grad": double}, {"exp_avg_sq": double}):
        item = changed(**parts)
        before = item.param.clone()
        selective_step([item], rule=ADAM, **how)
        assert (item.param != before).any()


def test_too_many_elements_are_left_to_the_reference():
    huge = torch.empty(1, dtype=BF16).expand(2**32)  # no memory behind it
    assert why_reference(Item(huge, huge, {}, 0), SGDRule(0.1)) == "the parameter has 2^32 elements or more"
    less = torch.empty(1, dtype=BF16).expand(2**32 - 1)
    assert why_reference(Item(less, less, {}, 0), SGDRule(0.1)) is None
    half, ranked = torch.empty(1, dtype=BF16).expand(2**31), Selection("top_k")
    reason = "the parameter has 2^31 elements or more, which are not ranked"
    assert why_reference(Item(half, half, {}, 0), SGDRule(0.1), ranked) == reason
    assert why_reference(Item(half[1:], half[1:], {}, 0), SGDRule(0.1), ranked) is None


def test_scores_in_float64_are_not_ranked_by_the_kernels(device):
    from selective.kernels.gpu import ranks

    assert not ranks(torch.zeros(3, dtype=torch.float64, device=device))
    score = torch.tensor([1.0, 1.0 + 1e-12, 0.0], dtype=torch.float64, device=device)
    assert top_k(score, 1).tolist() == [False, True, False]
