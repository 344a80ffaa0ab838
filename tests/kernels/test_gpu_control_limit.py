"""A control's limit among the random numbers, its launches, and steps that follow each other."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl
from gpu_control import (
    AGREEMENT,
    WITHOUT_SUMS,
    agrees,
    chosen_by_gpu,
    controlled,
    missing_brackets,
    short_lists,
    wanted_of,
)
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
from step_cases import RULES, SELECTIONS, STRENGTHS

from selective import Cautious, Grams, RandomMask, SelectiveUpdate
from selective.kernels import Draw, ItemList, Selection, Strength, selective_step, selective_steps, use_backend
from selective.kernels.gpu import control as plans
from selective.kernels.gpu import launch
from selective.kernels.gpu.device import control as device_code
from selective.kernels.gpu.device import limit, selections
from selective.kernels.gpu.device.random import ranking_bits
from selective.kernels.reference import control as by_definition
from selective.kernels.reference import random as reference_random
from selective.kernels.spec import StepCall, StepSpec

ADAM = RULES["adamw"]


@pytest.mark.parametrize(
    "numel, counts",
    [
        (1, [1]),
        (100, [99, 100]),
        (3_000, [1_300]),
        (25_000, [2]),
        pytest.param(5_000_003, [7, 1_234_567, 4_990_000], marks=pytest.mark.gpu),
    ],
)
def test_the_choice_is_the_definitions(numel, counts, device):
    """The bracket of the last has fewer than 2^16 numbers, of which fewer digits are looked at."""
    for count in counts:
        draw = Draw(1, count)
        assert torch.equal(chosen_by_gpu(device, numel, count, draw), wanted_of(numel, count, draw)), count


@triton.jit
def _few_bits(index: tl.tensor, first_key, second_key):
    return ranking_bits(index, first_key, second_key) & 0xF00000


@pytest.fixture
def few_numbers(monkeypatch):
    """Random numbers with 16 values only, so that most are equal to others."""
    definition = reference_random.ranking_bits
    monkeypatch.setattr(by_definition, "ranking_bits", lambda *a, **k: definition(*a, **k) & 0xF00000)
    monkeypatch.setattr(selections, "ranking_bits", _few_bits)


@pytest.mark.skipif(CUDA, reason="a compiled kernel keeps the function that it was compiled with")
@pytest.mark.parametrize("hinder", [None, missing_brackets, short_lists])
def test_equal_numbers_go_to_the_lower_index(hinder, few_numbers, device, monkeypatch):
    if hinder is not None:
        hinder(monkeypatch)
    for count in (1, 400):
        assert torch.equal(chosen_by_gpu(device, 1_100, count, Draw(3, 0)), wanted_of(1_100, count, Draw(3, 0))), count


@pytest.mark.parametrize("hinder", [missing_brackets, short_lists])
def test_a_list_of_no_use_is_noticed(hinder, device, monkeypatch):
    start = made(ADAM, (1_300,), seed=3)
    start.grad[500:600] = 0
    hinder(monkeypatch)
    for selection, strength in (("update", "still"), ("top_update", "norm_update")):
        agrees(start, ADAM, device, selection=controlled(SELECTIONS[selection]), strength=STRENGTHS[strength])


@triton.jit
def _believing(
    rank: tl.tensor, count, shift, least, indices, squares_ptr, pointers, row, keys, LISTED_ONLY, CFG, BLOCK
):
    return rank * 0


@pytest.mark.skipif(CUDA, reason="a compiled kernel keeps the function that it was compiled with")
def test_without_ranking_the_whole_tensor_that_shows(device, monkeypatch):
    """The twin of the above."""
    missing_brackets(monkeypatch)
    monkeypatch.setattr(limit, "_last_key", _believing)
    with pytest.raises(AssertionError):
        agrees(made(ADAM, (1_300,)), ADAM, device, selection=AGREEMENT, strength=WITHOUT_SUMS)


def test_a_bracket_holds_the_limit():
    """The bounds of the module: of 400 draws none misses, and no list is longer than its room."""
    for numel, count in itertools.product((700, 20_000), (0.001, 0.2, 0.5, 0.99)):
        picked = max(int(count * numel), 1)
        share = 1 - picked / numel
        reach = plans.WIDTH * (picked * share) ** 0.5 + device_code.SLACK.value
        for seed in range(50):
            bits = reference_random.ranking_bits(Draw(seed, 0), 0, numel)
            low, high = (2**24 * (share + side * reach / numel) for side in (-1, 1))
            limit = int(bits.sort(descending=True).values[picked - 1])
            assert low <= limit <= high
            assert int(((bits >= low) & (bits <= high)).sum()) <= plans.room_of(numel)


def test_every_tensor_has_its_own_numbers(device):
    first, second = (chosen_by_gpu(device, 100, 50, Draw(0, 0), address=a) for a in (0, 1))
    assert not torch.equal(first, second)
    assert int(first.sum()) == int(second.sum()) == 50


@pytest.mark.parametrize(
    "rule", ["adam_amsgrad_maximize", *(pytest.param(r, marks=pytest.mark.slow) for r in ("adamw", "adam_coupled"))]
)
def test_the_ways_with_fewer_passes_are_the_same_bits(rule, device, monkeypatch):
    """Moments that are stored early, and both halves of the look in one launch."""
    few_samples(monkeypatch)
    rule, how = RULES[rule], {"selection": controlled(Selection("top_k")), "strength": STRENGTHS["norm_update"]}
    start = made(rule, (600,), seed=1)
    results = []
    for moves, at_once in ((True, True), (False, False)):
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
    assert found == {"fixed": [5, 5], "mean": [5, 5], "ranked": [12, 12]}


def test_a_list_is_stepped_again_and_in_place(device):
    """By the plan of the first step: counts and lists begin anew; a batch of several dtypes."""
    start = [made(ADAM, (n,), DTYPES[d], address=i) for i, (n, d) in enumerate(((90, "f32"), (41, "bf16"), (7, "f32")))]
    items = ItemList(copied(item, device) for item in start)
    for number in range(2):
        how = {"selection": AGREEMENT, "strength": STRENGTHS["mean"], "draw": Draw(2, number)}
        before = [copied(item, "cpu") for item in items]
        sums = selective_step(items, rule=ADAM, statistics=True, backend="gpu", **how)
        assert sums is not None
        for was, item, ours in zip(before, items, sums, strict=True):
            twin, wanted = reference(was, ADAM, **how)
            assert_same_step(was, item, twin)
            assert_same_sums(ours, wanted)
    assert "plan" in items.cache


def test_groups_with_other_numbers_share_the_launches(device):
    """A cap, a seed and a strength of its own for each group."""
    calls, apart = [], []
    for group, cap in enumerate((0.5, 10.0)):
        start = made(ADAM, (60 + group,), seed=group, address=group)
        selection, strength = controlled(Selection("agreement"), cap=cap), Strength("fixed", 2.0 + group, 0.5)
        how = {"selection": selection, "strength": strength, "draw": Draw(group, 3)}
        mine, other = ItemList([copied(start, device)]), copied(start, device)
        calls.append(StepCall(mine, StepSpec(ADAM, **how, statistics=True)))
        apart.append((other, gpu(other, ADAM, **how)))
    together = selective_steps(calls, backend="gpu")
    assert len(calls[0].items.cache["plan"].batches) == 1
    for call, sums, (other, wanted) in zip(calls, together, apart, strict=True):
        assert list(sums) == [wanted]
        assert_equal_items(list(call.items), [other])


@pytest.mark.parametrize(("policy", "way"), [(Cautious(), "fused"), (Grams(), "scratch")], ids=str)
def test_an_optimizer_goes_on_from_its_checkpoint(policy, way, device):
    """A run in the kernels, stopped in the middle, is the run in the CPU's kernels."""

    def trained(backend: str, stop: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        where = device if backend == "gpu" else "cpu"
        params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(where)) for s in ((12, 30), ())]

        def made_anew() -> SelectiveUpdate:
            base = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)
            return SelectiveUpdate(base, policy=RandomMask.matching(policy), capture=way, seed=3)  # type: ignore[arg-type]

        optimizer = made_anew()
        with use_backend(backend):  # type: ignore[arg-type]
            for number in range(2):
                if number == stop:
                    saved, optimizer = optimizer.state_dict(), made_anew()
                    optimizer.load_state_dict(saved)
                for p in params:
                    p.grad = torch.randn(p.shape, generator=generator).to(where)
                optimizer.step()
            assert backend == "cpu" or "kernels   Triton" in optimizer.explain()
        return [p.detach().cpu() for p in params]

    for a, b in zip(trained("gpu", 1), trained("cpu", -1), strict=True):
        # Another coordinate would be off by an update, 1e-2; sums added in another order are by some 1e-6 of one.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
def test_a_large_tensor_gives_the_same_bits(device):
    """The order of the list depends on the order of atomics."""
    start = copied(made(ADAM, (3_000_000,), seed=1), device)
    for strength in (Strength("fixed", 1.0, -1.0, still=True), Strength("norm_preserving")):
        results = []
        for _ in range(50):
            item = copied(start)
            results.append((item, gpu(item, ADAM, selection=AGREEMENT, strength=strength)))
        for item, sums in results[1:]:
            assert torch.equal(item.param, results[0][0].param)
            assert sums == results[0][1]
