"""Exactly K: against a pure-Python stable sort, through the bracket, and with brackets that are made to miss."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selective.kernels import AdamRule, Draw, Item, LionRule, Selection, Strength, selective_step, top_k
from selective.kernels.cpu import chunks

threshold = importlib.import_module("selective.kernels.cpu.top_k")  # the function of that name hides the module

# few values, so that ties are many, and all the awkward ones
awkward = st.sampled_from([0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 1e-45, -1e-45, 3.4e38, 0.5])
scores = st.lists(st.one_of(awkward, st.floats(width=32)), max_size=40)


@settings(max_examples=300, deadline=None)
@given(values=scores, k=st.integers(-1, 42), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_is_the_stable_sort(transcription, values, k, dtype):
    score = torch.tensor(values, dtype=dtype)
    wanted = transcription.largest(score.tolist(), k)  # as they are in that dtype: 1e-45 is the smallest float32
    for backend in ("reference", "cpu"):
        assert top_k(score, k, backend=backend).tolist() == wanted


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), levels=st.sampled_from([1, 2, 5, 1000]), fraction=st.floats(0, 1), nan=st.booleans())
def test_bracket_is_the_stable_sort(transcription, seed, levels, fraction, nan):
    """A tensor large enough for a bracket of few samples, in chunks, with ties and NaN in bulk."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(-levels, levels + 1, (1500,), generator=generator) / levels
    if nan:
        score[torch.rand(1500, generator=generator) < 0.3] = torch.nan
    k = int(fraction * 1500)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threshold, "SAMPLE", 64)
        patch.setattr(chunks, "CHUNK", 200)
        assert top_k(score, k, backend="cpu").tolist() == transcription.largest(score.tolist(), k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_shapes(dtype, transcription):
    score = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    for view in (score, score.transpose(0, 2), score[::2], score[0, 0, 0]):
        for backend in ("reference", "cpu"):
            chosen = top_k(view, 2, backend=backend)
            assert chosen.shape == view.shape
            assert chosen.dtype == torch.bool
            assert chosen.reshape(-1).tolist() == transcription.largest(view.reshape(-1).tolist(), 2)


def items(rule, numel, ties):
    generator = torch.Generator().manual_seed(3)
    param = torch.randn(numel, generator=generator)
    grad = torch.randn(numel, generator=generator)
    if ties:
        grad[torch.rand(numel, generator=generator) < 0.7] = 0  # rows of an embedding that nobody looked up
    state = {"exp_avg": torch.randn(numel, generator=generator)}
    if isinstance(rule, AdamRule):
        state |= {"step": torch.tensor(5.0), "exp_avg_sq": torch.rand(numel, generator=generator)}
    return Item(param, grad, state, 0)


def selected_in_step(item, rule, selection):
    """The coordinates that a step selected, read off the parameter: the rest does not move."""
    before = item.param.clone()
    (sums,) = selective_step(
        [item], rule=rule, selection=selection, strength=Strength("fixed", 1.0, 0.0), draw=Draw(0, 0), statistics=True
    )
    return item.param != before, int(sums.selected)


@pytest.mark.parametrize("rule", [AdamRule(0.5, 0.9, 0.99, 1e-8), LionRule(0.5, 0.9, 0.99)], ids=["adam", "lion"])
@pytest.mark.parametrize("score", ["update", "momentum"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("miss", [False, True])
def test_step_selects_exactly_k(rule, score, ties, miss, monkeypatch, copy):
    """Through a bracket that holds and through one that misses: the same exactly K coordinates."""
    monkeypatch.setattr(threshold, "SAMPLE", 256)
    monkeypatch.setattr(chunks, "CHUNK", 1000)
    missed = []
    exact = threshold.exact
    monkeypatch.setattr(threshold, "exact", lambda t, k: (missed.append(1), exact(t, k))[1])
    if miss:
        monkeypatch.setattr(threshold, "bracket", lambda sample, k, numel, width: (-1e-30, -1e-31))
    selection = Selection("top_k", fraction=0.25, score=score)
    item = items(rule, 12_345, ties)
    other = copy(item)
    moved, count = selected_in_step(item, rule, selection)
    assert count == int(0.25 * 12_345)
    assert bool(missed) == miss
    selective_step(
        [other], rule=rule, selection=selection, strength=Strength("fixed", 1.0, 0.0), draw=Draw(0, 0),
        backend="reference",
    )  # fmt: skip
    # The fused kernel rounds u otherwise than the reference: scores a few eps apart may change places.
    assert (moved != (other.param != items(rule, 12_345, ties).param)).sum() <= 2


def test_without_the_fallback_a_missed_bracket_selects_wrongly(monkeypatch):
    """The failing twin: what the miss would do if it went unnoticed."""
    monkeypatch.setattr(threshold, "SAMPLE", 256)
    monkeypatch.setattr(threshold, "bracket", lambda sample, k, numel, width: (-1e-2, -1e-3))

    def unnoticed(self):
        t = torch.cat(self.values)
        value, _ = threshold._settle(t, min(max(self.k - self.below, 1), t.numel()))
        return threshold.Threshold(value, self.numel)

    rule, selection = AdamRule(0.5, 0.9, 0.99, 1e-8), Selection("top_k", fraction=0.1)
    right = selected_in_step(items(rule, 12_345, False), rule, selection)[1]
    monkeypatch.setattr(threshold.Collector, "settle", unnoticed)
    wrong = selected_in_step(items(rule, 12_345, False), rule, selection)[1]
    assert right == 1234
    assert wrong != 1234


def test_ties_go_to_the_lower_index_across_chunks(monkeypatch):
    monkeypatch.setattr(threshold, "SAMPLE", 256)
    monkeypatch.setattr(chunks, "CHUNK", 1000)
    rule = LionRule(0.5, 0.9, 0.99)  # equal scores everywhere
    item = Item(torch.zeros(5000), torch.ones(5000), {"exp_avg": torch.ones(5000)}, 0)
    moved, count = selected_in_step(item, rule, Selection("top_k", fraction=0.7))
    assert count == 3500
    assert moved[:3500].all()
    assert not moved[3500:].any()


def test_one_element_is_dense_and_all_zero_gradients_select_k():
    rule = AdamRule(0.5, 0.9, 0.99, 1e-8)
    one = items(rule, 1, False)
    (sums,) = selective_step(
        [one], rule=rule, selection=Selection("top_k"), strength=Strength("fixed", 2.0, 0.5), draw=Draw(0, 0),
        statistics=True,
    )  # fmt: skip
    assert (sums.selected, sums.strength_selected, sums.strength_rest) == (1, 1, 1)
    zero = items(rule, 1001, False)
    zero.grad.zero_()
    moved, count = selected_in_step(zero, rule, Selection("top_k"))
    assert count == 500
    assert moved[:500].all()  # ±0 are ties
    assert not moved[500:].any()


def test_sampled_threshold_comes_near(make):
    """64k of 300k scores, in runs of 8: the share is within 1 % (five standard deviations) of what was asked."""
    rule = AdamRule(0.5, 0.9, 0.99, 1e-8)
    for backend in ("reference", "cpu"):
        item = items(rule, 300_000, False)
        (sums,) = selective_step(
            [item], rule=rule, selection=Selection("top_k", fraction=0.3, quantile="sampled"),
            strength=Strength("fixed", 1.0, 0.0), draw=Draw(0, 0), statistics=True, backend=backend,
        )  # fmt: skip
        assert abs(float(sums.selected) / 300_000 - 0.3) < 0.01
        assert sums.selected != 90_000


@pytest.mark.parametrize("kind", ["normal", "few values", "constant", "sorted", "with NaN and infinity"])
def test_ranks_by_a_bracket_are_those_of_kthvalue(kind):
    from selective.kernels.cpu.top_k import INNER, smallest

    n = 5 * INNER + 3
    t = torch.randn(n, generator=torch.Generator().manual_seed(0))
    if kind == "few values":
        t = t.round()
    elif kind == "constant":
        t = torch.full((n,), -0.0)
    elif kind == "sorted":
        t = t.sort().values
    elif kind == "with NaN and infinity":
        t[::7], t[1::7], t[2::7] = torch.nan, torch.inf, -torch.inf
    for ranks in [(1,), (n // 2,), (n // 2, n // 2 + 700), (3, 900), (n - n // 7 - 1,)]:
        assert smallest(t, ranks) == [float(torch.kthvalue(t, rank).values) for rank in ranks]
