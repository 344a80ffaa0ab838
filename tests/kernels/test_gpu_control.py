"""The matched random control in Triton kernels: the reference's coordinates exactly, its sums and steps to rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_control import AGREEMENT, WITHOUT_SUMS, agrees, controlled
from gpu_support import (
    CUDA,
    DTYPES,
    assert_equal_items,
    assert_same_step,
    assert_same_sums,
    copied,
    few_samples,
    gpu,
    made,
    reference,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from step_cases import RULES, SELECTIONS, STRENGTHS, needs_momentum

from selective.kernels import Decay, Draw, GivenRule, Selection, SGDRule, selective_step

ADAM = RULES["adamw"]
# Each rule, selection, strength and choice of dtypes is in a cell.
CELLS = [
    (list(RULES)[(3 * i) % 10], selection, list(STRENGTHS)[(2 * i) % 9], list(DTYPES)[(3 * i) % 8], i % 4 != 3)
    for i, selection in enumerate(SELECTIONS)
]


@pytest.mark.parametrize(
    "rule, selection, strength, dtypes, norm",
    [pytest.param(*cell, marks=pytest.mark.slow if i % 3 and not CUDA else ()) for i, cell in enumerate(CELLS)],
)
def test_is_the_reference(rule, selection, strength, dtypes, norm, device, monkeypatch):
    """With coordinates that stand still, and scores that are ranked by a bracket."""
    few_samples(monkeypatch)
    rule, selection, strength = RULES[rule], SELECTIONS[selection], STRENGTHS[strength]
    if isinstance(rule, SGDRule) and rule.momentum == 0 and needs_momentum(selection, strength):
        rule = ADAM
    start = made(rule, (11, 271), DTYPES[dtypes], seed=3)
    start.grad[3:7] = 0
    agrees(start, rule, device, selection=controlled(selection, norm=norm), strength=strength)


def test_every_part_is_in_a_cell():
    for place, names in enumerate((RULES, SELECTIONS, STRENGTHS, DTYPES)):
        assert {cell[place] for cell in CELLS} == set(names)


@pytest.mark.slow
@pytest.mark.skipif(CUDA, reason="thousands of kernels to compile; interpreted, they are the same")
@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_combination(rule, selection, device):
    for i, (strength_name, strength) in enumerate(STRENGTHS.items()):
        for j, (name, dtypes) in enumerate(list(DTYPES.items())[::3]):
            if isinstance(rule, SGDRule) and rule.momentum == 0 and needs_momentum(selection, strength):
                continue
            start = made(rule, (11, 71), dtypes, seed=i + j)
            start.grad[3:7] = 0
            how = {"selection": controlled(selection, norm=j != 1), "strength": strength}
            agrees(start, rule, device, f"{strength_name} {name}", **how)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "rule, selection, dtypes, strength",
    [
        (rule, selection, ("f32", "bf16", "bf16+f32")[(i + j) % 3], ("fixed", "norm_update", "still")[(i + 2 * j) % 3])
        for i, rule in enumerate(("adamw", "lion", "sgd_nesterov", "scratch"))
        for j, selection in enumerate(("update", "top_update", "top_sampled", "element"))
    ],
)
def test_real_sizes(rule, selection, dtypes, strength, device):
    """A number of the policy that differs by one (a score within rounding of the K-th) moves one more coordinate."""
    rule, how = RULES[rule], {"selection": controlled(SELECTIONS[selection]), "strength": STRENGTHS[strength]}
    start = made(rule, (1500, 1111), DTYPES[dtypes], seed=1)
    item = copied(start, device)
    sums = gpu(item, rule, **how)
    twin, wanted = reference(start, rule, **how)
    assert abs(float(sums.selected) - float(wanted.selected)) <= 2
    moved, theirs = ((x.param.cpu().double() - start.param.double()).abs() for x in (item, twin))
    # the scale is off by 1e-6 where one coordinate is another; a coordinate that is, by its whole update
    apart = (moved - theirs).abs() > 1e-4 * theirs + 2 * torch.finfo(start.param.dtype).eps * start.param.abs().double()
    assert int(apart.sum()) <= 8


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(), (0,), (1,), (2, 1), (63,), (5, 13), (2049,)]), norm=st.booleans(),
    seed=st.integers(0, 99),
    name=st.sampled_from(["everything", "update", "top_update", "top_none", "element", "tensor"]),
    strength=st.sampled_from(["still", "fixed", "norm_update"]), zeros=st.sampled_from(["none", "some", "all"]),
)  # fmt: skip
def test_any_shape_and_any_number_that_stand_still(shape, norm, seed, name, strength, zeros, device):
    start = made(ADAM, shape, seed=seed)
    if zeros != "none":
        start.grad.view(-1)[slice(None) if zeros == "all" else slice(0, start.grad.numel() // 2)] = 0
    how = {"selection": controlled(SELECTIONS[name], norm=norm), "strength": STRENGTHS[strength]}
    agrees(start, ADAM, device, draw=Draw(seed, 3), **how)


@pytest.mark.parametrize("kept", [40, 900])
def test_more_are_selected_than_move(kept, device):
    """The rows of an embedding that were touched: all of them move, and then some that stand still are "selected"."""
    start = made(ADAM, (60, 50), seed=2)
    start.grad.view(-1)[kept:] = 0
    for selection in (Selection("bernoulli", probability=0.9), Selection("bernoulli", probability=0.2)):
        agrees(start, ADAM, device, selection=controlled(selection), strength=STRENGTHS["still"])


@pytest.mark.parametrize("selection", ["update", "top_update", pytest.param("top_sampled", marks=pytest.mark.slow)])
def test_nan_is_not_counted_and_stays_where_it_is(selection, device, monkeypatch):
    """A top-K with so many NaN that it selects fewer than K: the number that was known in advance is wrong."""
    few_samples(monkeypatch)
    start = made(ADAM, (700,))
    start.grad[7], start.grad[100:600] = torch.inf, torch.nan
    agrees(start, ADAM, device, selection=controlled(SELECTIONS[selection]), strength=STRENGTHS["fixed"])
    start = made(GivenRule(), (200,))
    start.grad.fill_(torch.nan)  # none is selected
    agrees(start, GivenRule(), device, selection=controlled(SELECTIONS[selection]), strength=STRENGTHS["fixed"])


def test_a_cap_and_multipliers_that_grow(device):
    """One coordinate has all of the norm, and the control does not draw it."""
    start = made(ADAM, (500,))
    start.grad[17] = start.state["exp_avg"][17] = 1e4
    for cap in (0.5, 1e9):
        how = {"selection": controlled(Selection("top_k", fraction=0.01), cap=cap), "strength": WITHOUT_SUMS}
        agrees(start, ADAM, device, **how)


def test_other_layouts_and_a_decay_that_selects(device):
    """Flat indices are in row-major order, whatever the memory is in."""
    start = made(ADAM, (9, 40), seed=1)
    item = copied(start, device)
    for name in ("exp_avg", "exp_avg_sq"):
        item.state[name] = item.state[name].t().contiguous().t()
    item.param, item.grad = (x.t().contiguous().t() for x in (item.param, item.grad))
    how = {"selection": AGREEMENT, "strength": STRENGTHS["mean"]}
    sums = gpu(item, ADAM, decay=Decay(of="masked"), **how)
    twin, wanted = reference(start, ADAM, decay=Decay(of="masked"), **how)
    assert_same_step(start, item, twin)
    assert_same_sums(sums, wanted)


def test_stochastic_rounding_draws_as_the_reference(device):
    """And nothing but the report depends on statistics."""
    start = made(ADAM, (700,), DTYPES["bf16+f32"], seed=1)
    how = {"selection": AGREEMENT, "strength": WITHOUT_SUMS, "draw": Draw(7, 3, stochastic=True)}
    agrees(start, ADAM, device, **how)
    item, quiet = copied(start, device), copied(start, device)
    gpu(item, ADAM, **how)
    assert selective_step([quiet], rule=ADAM, backend="gpu", **how) is None
    assert_equal_items([item], [quiet])


def _along(grad, update, momentum, least):
    return grad * update > least


def test_a_function_is_controlled_as_the_selection_that_it_is(device):
    """Of a negative rate, too. The reference can't call a Triton function."""
    from selective.kernels.gpu import jitted

    rule = replace(ADAM, lr=-1e-2)
    start, how = made(rule, (300,), seed=1), {"strength": STRENGTHS["norm_update"]}
    function = controlled(Selection("function", function=jitted(_along), numbers=(0.0,)))
    mine, other = copied(start, device), copied(start, device)
    ours, theirs = gpu(mine, rule, selection=function, **how), gpu(other, rule, selection=AGREEMENT, **how)
    assert ours == theirs
    assert_equal_items([mine], [other])
    agrees(start, rule, device, selection=AGREEMENT, **how)
