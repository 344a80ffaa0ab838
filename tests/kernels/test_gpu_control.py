"""The matched random control in Triton kernels: the reference's coordinates exactly, its sums and steps to rounding."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
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

from selective import Cautious, Grams, RandomMask, SelectiveUpdate
from selective.kernels import (
    Control,
    Decay,
    Draw,
    GivenRule,
    Item,
    ItemList,
    Rule,
    Selection,
    SGDRule,
    Strength,
    selective_step,
    use_backend,
)
from selective.kernels.gpu import control as plans
from selective.kernels.gpu import launch
from selective.kernels.gpu.device import control as device_code
from selective.kernels.gpu.device import selections
from selective.kernels.gpu.device.random import random_bits
from selective.kernels.reference import control as by_definition
from selective.kernels.reference import random as reference_random
from selective.kernels.reference.control import random_subset

ADAM = RULES["adamw"]
WITHOUT_SUMS = Strength("fixed", 1.0, 0.0)
# Each rule, selection, strength and choice of dtypes is in a cell.
CELLS = [
    (list(RULES)[(3 * i) % 10], selection, list(STRENGTHS)[(2 * i) % 9], list(DTYPES)[(3 * i) % 8], i % 4 != 3)
    for i, selection in enumerate(SELECTIONS)
]


def controlled(selection: Selection, **how: Any) -> Selection:
    return replace(selection, control=Control(**how))


def agrees(start: Item, rule: Rule, device: str, what: str = "", **how: Any) -> None:
    """Take one step from one start, and compare it with the reference's."""
    item = copied(start, device)
    sums = gpu(item, rule, **how)
    twin, wanted = reference(start, rule, **how)
    assert_same_step(start, item, twin, what)
    assert_same_sums(sums, wanted, what)


def chosen(device: str, numel: int, count: int, draw: Draw, address: int = 4) -> torch.Tensor:
    """The elements of a tensor that the control of some `count` of them moves."""
    item = Item(torch.zeros(numel, device=device), torch.ones(numel, device=device), {}, address)
    selection = controlled(Selection("top_k", fraction=min((count + 0.5) / numel, 1.0)), norm=False)
    gpu(item, SGDRule(1.0), selection=selection, strength=WITHOUT_SUMS, draw=draw)
    return (item.param != 0).cpu()


def wanted_of(numel: int, count: int, draw: Draw, address: int = 4) -> torch.Tensor:
    return random_subset(torch.arange(numel) < count, None, draw, address)


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
@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_combination(rule, selection, device):
    for i, (strength_name, strength) in enumerate(STRENGTHS.items()):
        for j, (name, dtypes) in enumerate(list(DTYPES.items())[:: 1 if CUDA else 3]):
            if isinstance(rule, SGDRule) and rule.momentum == 0 and needs_momentum(selection, strength):
                continue
            start = made(rule, (11, 71), dtypes, seed=i + j)
            start.grad[3:7] = 0
            how = {"selection": controlled(selection, norm=j != 1), "strength": strength}
            agrees(start, rule, device, f"{strength_name} {name}", **how)


@pytest.mark.gpu
@pytest.mark.parametrize("strength", ["fixed", "norm_update", "still"])
@pytest.mark.parametrize("selection", ["update", "top_update", "top_sampled", "element"])
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "bf16+f32"])
@pytest.mark.parametrize("rule", ["adamw", "lion", "sgd_nesterov", "scratch"])
def test_real_sizes(rule, dtypes, selection, strength, device):
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


@pytest.mark.parametrize("numel, counts", [(1, [1]), (100, [1, 2, 99, 100]), (5_000, [100, 1_700])])
def test_the_choice_is_the_definitions(numel, counts, device):
    for count in counts:
        draw = Draw(1, count)
        assert torch.equal(chosen(device, numel, count, draw), wanted_of(numel, count, draw)), count


@settings(max_examples=8, deadline=None, derandomize=True)
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


@triton.jit
def _few_bits(index: tl.tensor, first_key, second_key):
    return random_bits(index, first_key, second_key) & 0xF00000


@pytest.fixture
def few_numbers(monkeypatch):
    """Random numbers with 16 values only, so that most are equal to others."""
    uniform_bits = reference_random.uniform_bits
    monkeypatch.setattr(by_definition, "uniform_bits", lambda *a, **k: uniform_bits(*a, **k) & 0xF00000)
    monkeypatch.setattr(selections, "random_bits", _few_bits)


def missing_brackets(monkeypatch) -> None:
    """Turn brackets inside out, so that they hold nothing."""
    monkeypatch.setattr(plans, "WIDTH", -1000.0)


def short_lists(monkeypatch) -> None:
    """Give the list of a tensor fewer places than its bracket has elements."""
    monkeypatch.setattr(plans, "room_of", lambda numel: min(numel, 3))


@pytest.mark.skipif(CUDA, reason="a compiled kernel keeps the function that it was compiled with")
@pytest.mark.parametrize("hinder", [None, missing_brackets, short_lists])
def test_equal_numbers_go_to_the_lower_index(hinder, few_numbers, device, monkeypatch):
    if hinder is not None:
        hinder(monkeypatch)
    for count in (1, 700, 2_000):
        assert torch.equal(chosen(device, 2_300, count, Draw(3, 0)), wanted_of(2_300, count, Draw(3, 0))), count


@pytest.mark.parametrize("hinder", [missing_brackets, short_lists])
def test_a_list_of_no_use_is_noticed(hinder, device, monkeypatch):
    start = made(ADAM, (2_300,), seed=3)
    start.grad[500:600] = 0
    hinder(monkeypatch)
    for selection, strength in (("update", "still"), ("top_update", "norm_update")):
        agrees(start, ADAM, device, selection=controlled(SELECTIONS[selection]), strength=STRENGTHS[strength])


@triton.jit
def _believing(rank: tl.tensor, count, indices, squares_ptr, pointers, row, keys, LISTED_ONLY, CFG, BLOCK):
    return rank * 0


@pytest.mark.skipif(CUDA, reason="a compiled kernel keeps the function that it was compiled with")
def test_without_ranking_the_whole_tensor_that_shows(device, monkeypatch):
    """The twin of the above."""
    missing_brackets(monkeypatch)
    monkeypatch.setattr(device_code, "_last_key", _believing)
    with pytest.raises(AssertionError):
        agrees(made(ADAM, (2_300,)), ADAM, device, selection=controlled(Selection("agreement")), strength=WITHOUT_SUMS)


@pytest.mark.parametrize("selection", ["update", "top_update", pytest.param("top_sampled", marks=pytest.mark.slow)])
def test_nan_is_not_counted_and_stays_where_it_is(selection, device, monkeypatch):
    """A top-K with so many NaN that it selects fewer than K: the number that was known in advance is wrong."""
    few_samples(monkeypatch)
    start = made(ADAM, (1_300,))
    start.grad[7], start.grad[200:1_200] = torch.inf, torch.nan
    agrees(start, ADAM, device, selection=controlled(SELECTIONS[selection]), strength=STRENGTHS["fixed"])
    start = made(GivenRule(), (200,))
    start.grad.fill_(torch.nan)  # none is selected
    agrees(start, GivenRule(), device, selection=controlled(SELECTIONS[selection]), strength=STRENGTHS["fixed"])


def test_a_cap_and_multipliers_that_grow(device):
    """One coordinate has all of the norm, and the control does not draw it."""
    start = made(ADAM, (500,))
    start.grad[17] = start.state["exp_avg"][17] = 1e4
    for cap in (0.5, 3.0, 1e9):
        how = {"selection": controlled(Selection("top_k", fraction=0.01), cap=cap), "strength": WITHOUT_SUMS}
        agrees(start, ADAM, device, **how)


def test_other_layouts_and_a_decay_that_selects(device):
    """Flat indices are in row-major order, whatever the memory is in."""
    start = made(ADAM, (9, 40), seed=1)
    item = copied(start, device)
    for name in ("exp_avg", "exp_avg_sq"):
        item.state[name] = item.state[name].t().contiguous().t()
    item.param, item.grad = (x.t().contiguous().t() for x in (item.param, item.grad))
    how = {"selection": controlled(Selection("agreement")), "strength": STRENGTHS["mean"]}
    sums = gpu(item, ADAM, decay=Decay(of="masked"), **how)
    twin, wanted = reference(start, ADAM, decay=Decay(of="masked"), **how)
    assert_same_step(start, item, twin)
    assert_same_sums(sums, wanted)


@pytest.mark.parametrize(
    "rule", ["adam_amsgrad_maximize", *(pytest.param(r, marks=pytest.mark.slow) for r in ("adamw", "adam_coupled"))]
)
def test_the_ways_with_fewer_passes_are_the_same_bits(rule, device, monkeypatch):
    """Moments that are stored early, and both halves of the look in one launch."""
    few_samples(monkeypatch)
    rule, how = RULES[rule], {"selection": controlled(Selection("top_k")), "strength": STRENGTHS["norm_update"]}
    start = made(rule, (600,), seed=1)
    results = []
    for moves, at_once in ((True, True), (False, True), (True, False)):
        with monkeypatch.context() as patch:
            plan = plans.ControlPlan.__init__

            def changed(self, *args, plan=plan, moves=moves, at_once=at_once):
                plan(self, *args)
                assert self.moves and self.at_once
                self.moves, self.at_once = moves, at_once

            patch.setattr(plans.ControlPlan, "__init__", changed)
            item = copied(start, device)
            results.append((item, gpu(item, rule, **how)))
    for item, sums in results[1:]:
        assert_equal_items([item], [results[0][0]])
        assert sums == results[0][1]


def test_many_tensors_take_as_many_launches_as_one(device, monkeypatch):
    few_samples(monkeypatch)
    names: list[str] = []
    monkeypatch.setattr(
        launch, "run", lambda kernel, *a, **k: names.append(kernel.fn.__name__)
    )  # no step reads a result
    found: dict[str, list[int]] = {}
    for case, selection, strength in (
        ("fixed", Selection("agreement"), WITHOUT_SUMS), ("mean", Selection("agreement"), Strength("mean_preserving")),
        ("ranked", Selection("top_k"), WITHOUT_SUMS),
    ):  # fmt: skip
        for numels in ((300,), (300, 7, 1, 400, 0)):
            items = ItemList(copied(made(ADAM, (n,), address=i), device) for i, n in enumerate(numels))
            names.clear()
            selective_step(items, rule=ADAM, selection=controlled(selection), strength=strength, draw=Draw(0, 0),
                           backend="gpu")  # fmt: skip
            found.setdefault(case, []).append(len([n for n in names if n != "whole_kernel"]))
    assert found == {"fixed": [5, 5], "mean": [5, 5], "ranked": [13, 13]}


def test_a_list_is_stepped_again_and_in_place(device):
    """By the plan of the first step: counts and lists begin anew; a batch of several dtypes."""
    start = [made(ADAM, (n,), DTYPES[d], address=i) for i, (n, d) in enumerate(((90, "f32"), (41, "bf16"), (7, "f32")))]
    items = ItemList(copied(item, device) for item in start)
    for number in range(2):
        how = {"selection": controlled(Selection("agreement")), "strength": STRENGTHS["mean"], "draw": Draw(2, number)}
        before = [copied(item, "cpu") for item in items]
        sums = selective_step(items, rule=ADAM, statistics=True, backend="gpu", **how)
        assert sums is not None
        for was, item, ours in zip(before, items, sums, strict=True):
            twin, wanted = reference(was, ADAM, **how)
            assert_same_step(was, item, twin)
            assert_same_sums(ours, wanted)
    assert "plan" in items.cache


@pytest.mark.parametrize(("policy", "way"), [(Cautious(), "fused"), (Grams(), "scratch")], ids=str)
def test_an_optimizer_goes_on_from_its_checkpoint(policy, way, device):
    """The kernels' run, stopped in the middle, is the run of the CPU's kernels."""

    def trained(backend: str, stop: bool) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        where = device if backend == "gpu" else "cpu"
        params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(where)) for s in ((12, 30), ())]

        def made_anew() -> SelectiveUpdate:
            base = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)
            return SelectiveUpdate(base, policy=RandomMask.matching(policy), capture=way, seed=3)  # type: ignore[arg-type]

        optimizer = made_anew()
        with use_backend(backend):  # type: ignore[arg-type]
            for number in range(3):
                if stop and number == 1:
                    saved, optimizer = optimizer.state_dict(), made_anew()
                    optimizer.load_state_dict(saved)
                for p in params:
                    p.grad = torch.randn(p.shape, generator=generator).to(where)
                optimizer.step()
            assert backend == "cpu" or "kernels   Triton" in optimizer.explain()
        return [p.detach().cpu() for p in params]

    stopped, straight, on_cpu = trained("gpu", True), trained("gpu", False), trained("cpu", False)
    for a, b, c in zip(stopped, straight, on_cpu, strict=True):
        assert torch.equal(a, b)
        # Another coordinate would be off by an update, 1e-2; sums added in another order are by some 1e-6 of one.
        torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-7)


def test_stochastic_rounding_draws_as_the_reference(device):
    start = made(ADAM, (700,), DTYPES["bf16"], seed=1)
    how = {"selection": controlled(Selection("agreement")), "strength": WITHOUT_SUMS}
    agrees(start, ADAM, device, draw=Draw(7, 3, stochastic=True), **how)


def test_every_tensor_has_its_own_numbers(device):
    first, second = (chosen(device, 100, 50, Draw(0, 0), address=a) for a in (0, 1))
    assert not torch.equal(first, second)
    assert int(first.sum()) == int(second.sum()) == 50


def test_a_bracket_holds_the_limit():
    """The bounds of the module: of 400 draws none misses, and no list is longer than its room."""
    for numel, count in itertools.product((700, 20_000), (0.001, 0.2, 0.5, 0.99)):
        picked = max(int(count * numel), 1)
        share = 1 - picked / numel
        reach = plans.WIDTH * (picked * share) ** 0.5 + device_code.SLACK.value
        for seed in range(50):
            bits = reference_random.uniform_bits(Draw(seed, 0), 0, numel)
            low, high = (2**24 * (share + side * reach / numel) for side in (-1, 1))
            limit = int(bits.sort(descending=True).values[picked - 1])
            assert low <= limit <= high
            assert int(((bits >= low) & (bits <= high)).sum()) <= plans.room_of(numel)


@pytest.mark.gpu
def test_a_large_tensor_gives_the_same_bits(device):
    """The order of the list depends on the order of atomics."""
    start = copied(made(ADAM, (3_000_000,), seed=1), device)
    for strength in (Strength("fixed", 1.0, -1.0, still=True), Strength("norm_preserving")):
        results = []
        for _ in range(50):
            item = copied(start)
            results.append((item, gpu(item, ADAM, selection=controlled(Selection("agreement")), strength=strength)))
        for item, sums in results[1:]:
            assert torch.equal(item.param, results[0][0].param)
            assert sums == results[0][1]
