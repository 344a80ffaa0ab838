"""Exactly K on the GPU path: what steps select, against a stable sort of the scores that their own kernels form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_support import BF16, F16, F32, copied, few_samples, gpu, made, missing_brackets, no_repair, short_lists

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

# u = ± a power of two (Lion), or any number of 8 digits times a gradient of as many: scores that are exact in float32
ADAM, LION, SGD, GIVEN = AdamRule(0.5, 0.9, 0.99, 1e-8), LionRule(0.5, 0.9, 0.99), SGDRule(0.5, 0.9), GivenRule()
IN_PLACE = GivenRule(negated=True)  # `start_of` makes it start from the parameter itself, as scratch capture does


def sorted_out(score: torch.Tensor, k: int) -> torch.Tensor:
    return top_k(score.cpu(), k, backend="reference")


def own_scores(item: Item, rule, score: str = "update") -> tuple[torch.Tensor, torch.Tensor]:
    """The scores that the kernels form, and which coordinates their step can be read off from.

    From a step of a copy: it writes its momentum, and where the parameter is zero and everything is selected, its
    update. Both are in float32, or exact in what they are stored in.
    """
    if isinstance(rule, GivenRule):
        u, m = item.state["update"] * (-1 if rule.negated else 1), item.state["momentum"]
    else:
        probe = copied(item)
        probe.param.zero_()
        gpu(probe, rule, selection=Selection("everything"), strength=Strength("fixed"))
        u, m = -probe.param, probe.state.get("exp_avg", probe.state.get("momentum_buffer"))
    x = u if score == "update" else m
    return x.float() * item.grad.float(), u.isfinite().cpu()  # 0 times what is not finite moves as well


def selected_by(item: Item, rule, selection, strength) -> tuple[torch.Tensor, int]:
    """The selection of a step, read off the parameter: it was zero, and only the selected move, by u, never 0."""
    item = copied(item)
    item.param.zero_()
    if "start" in item.state:
        item.state["start"].zero_()
    before = item.param.clone()
    sums = gpu(item, rule, selection=selection, strength=strength)
    return (item.param != before).cpu(), int(sums.selected)


def untouched_rows(item: Item, share: float = 0.99) -> None:
    """An embedding: most rows have no gradient, and so a score of exactly 0."""
    rows = torch.rand(item.grad.shape[0], generator=torch.Generator().manual_seed(9)) < share
    item.grad[rows.to(item.grad.device)] = 0


WAYS = {
    "one pass": (ADAM, F32, Strength("fixed", 1.0, 0.0)),
    "one pass, a mean": (ADAM, F32, Strength("mean_preserving", cap=1e9)),
    "two passes, Lion": (LION, F32, Strength("fixed", 1.0, 0.0)),
    "two passes, Lion in bfloat16": (LION, BF16, Strength("fixed", 1.0, 0.0)),
    "two passes, SGD": (SGD, F32, Strength("fixed", 1.0, 0.0)),
    "two passes, given in float16": (GIVEN, F16, Strength("fixed", 1.0, 0.0)),
    "one pass, given": (IN_PLACE, F32, Strength("fixed", 1.0, 0.0)),
    "two passes, given in place in bfloat16": (IN_PLACE, BF16, Strength("fixed", 1.0, 0.0)),
}
LIKE = ["normal", "few values", "constant", "untouched rows", "all zero", "NaN and infinity", "one outlier"]


def start_of(rule, dtype, like: str, device: str, shape=(30, 50)) -> Item:
    item = made(rule, shape, (dtype, dtype, dtype), seed=1)
    flat = item.grad.view(-1)
    if like == "few values":
        item.grad.copy_((item.grad * 20).round() / 4)
    elif like == "constant":
        for x in (item.grad, *(v for k, v in item.state.items() if k != "step")):
            x.fill_(0.5)
    elif like == "untouched rows":
        untouched_rows(item)
    elif like == "all zero":
        item.grad.zero_()
    elif like == "NaN and infinity":
        flat[::7], flat[1::97] = torch.nan, torch.inf
    elif like == "one outlier":
        flat[1034] = 6e4
    if rule is IN_PLACE:
        item.state["start"] = item.param
    return copied(item, device)


SCORES = [(like, "none") for like in LIKE] + [
    ("normal", "missed"),
    ("untouched rows", "missed"),
    ("untouched rows", "overflow"),
    ("NaN and infinity", "both"),
]
WAYS["two passes, a norm"] = ADAM, F32, Strength("norm_preserving", cap=1e9)
WAYS["two passes, a mean in bfloat16"] = LION, BF16, Strength("mean_preserving", cap=1e9)
IN_FULL = ("one pass", "two passes, Lion")  # both ways through the kernels; the others rank by the same code


def scores_of_ways() -> list[Any]:
    """Each way with all scores; all but one of them in the slow lane where the way is not tried in full."""
    return [
        pytest.param(
            way, like, trouble,
            marks=[] if way in IN_FULL or (like, trouble) == ("untouched rows", "none") else pytest.mark.slow,
        )
        for way in WAYS for like, trouble in SCORES
    ]  # fmt: skip


@pytest.mark.parametrize("way, like, trouble", scores_of_ways())
def test_a_step_selects_exactly_k(way, like, trouble, device, monkeypatch):
    """The coordinates of a stable sort of the kernels' own scores, in every way there is to them."""
    few_samples(monkeypatch)
    if trouble in ("missed", "both"):
        missing_brackets(monkeypatch)
    if trouble in ("overflow", "both"):
        short_lists(monkeypatch)
    rule, dtype, strength = WAYS[way]
    item = start_of(rule, dtype, like, device)
    score = "momentum" if list(WAYS).index(way) % 2 and dtype == F32 else "update"
    own, readable = own_scores(item, rule, score)
    # A quarter: a mean is kept by a multiplier of 4, so that what is taken back of a zero leaves no rounding.
    for fraction in (0.25,) if trouble != "none" else (0.001, 0.6):
        k = int(fraction * item.param.numel())
        wanted = sorted_out(own, k)
        chosen, count = selected_by(item, rule, Selection("top_k", score=score, fraction=fraction), strength)
        assert count == int(wanted.sum())
        assert torch.equal(chosen & readable, wanted & readable)


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[] if way in (*IN_FULL, "one pass, given") else pytest.mark.slow) for way in WAYS]
)
def test_k_of_nothing_one_and_all(way, device, monkeypatch):
    few_samples(monkeypatch)
    rule, dtype, strength = WAYS[way]
    for shape in ((), (37,), (900,)):
        item = start_of(rule, dtype, "normal", device, shape)
        d = item.param.numel()
        for fraction in (0.0, 1 / d, 1.0):
            k = int(fraction * d)
            chosen, count = selected_by(item, rule, Selection("top_k", fraction=fraction), strength)
            if k == 0:  # dense
                assert (count, bool(chosen.all())) == (d, True)
            else:
                assert count == k
                assert torch.equal(chosen, sorted_out(own_scores(item, rule)[0], k))


@pytest.mark.parametrize(
    "way, trouble",
    [
        ("one pass", missing_brackets),
        ("one pass", short_lists),
        ("one pass, given", missing_brackets),
        ("one pass, given", short_lists),
        ("two passes, Lion", missing_brackets),
        pytest.param("two passes, a norm", missing_brackets, marks=pytest.mark.slow),
    ],
)
def test_without_the_repair_a_selection_is_wrong(way, trouble, device, monkeypatch):
    """The failing twin: what a bracket that missed, or a list that overflowed, would do if nobody mended it.

    Not of a list that overflows in two passes: ranks are stored by their place in the list, which nothing bounds then
    but the repair. Such a twin writes past its memory.
    """
    few_samples(monkeypatch)
    trouble(monkeypatch)
    rule, dtype, strength = WAYS[way]
    item = start_of(rule, dtype, "untouched rows", device)  # the K-th score is one of many zeros
    selection, wanted = Selection("top_k", fraction=0.3), sorted_out(own_scores(item, rule)[0], 450)
    assert torch.equal(selected_by(item, rule, selection, strength)[0], wanted)
    no_repair(monkeypatch)
    assert not torch.equal(selected_by(item, rule, selection, strength)[0], wanted)


@pytest.mark.parametrize("rule", [ADAM, IN_PLACE, replace(IN_PLACE, offset=1.0, factor=0.9)], ids=str)
def test_a_missed_bracket_is_the_same_step(rule, device, monkeypatch):
    """A mended element is rounded twice where it had been decided.

    That is at most three roundings, of half a unit of the largest number in it, more than in one go, and one that is
    not shared.
    """
    few_samples(monkeypatch)
    start = start_of(rule, F32, "normal", device)
    if isinstance(rule, GivenRule):
        start.state["start"] = start.param
    kept = {}
    for missed in (False, True):
        if missed:
            missing_brackets(monkeypatch)
        kept[missed] = item = copied(start)
        sums = gpu(item, rule, selection=Selection("top_k", fraction=0.3), strength=Strength("fixed", 1.5, 0.25))
        assert sums.selected == 450
    a, b = kept[False].param, kept[True].param
    probe = copied(start)
    probe.param.zero_()
    gpu(probe, rule, selection=Selection("everything"), strength=Strength("fixed", 1.5))
    size = torch.maximum(torch.maximum(a.abs(), start.param.abs()), probe.param.abs())
    assert ((a - b).abs() <= 2 * torch.finfo(F32).eps * size).all()


def test_ties_go_to_the_lower_index_across_blocks(device, monkeypatch):
    few_samples(monkeypatch)
    for rule in (ADAM, LION):
        item = start_of(rule, F32, "constant", device, (5000,))
        chosen, count = selected_by(item, rule, Selection("top_k", fraction=0.7), Strength("fixed"))
        assert count == 3500
        assert chosen[:3500].all() and not chosen[3500:].any()


def test_many_tensors_in_one_launch_each_have_their_k(device, monkeypatch):
    """Small and large ones, some whose bracket holds nothing but ties: each as if it were alone."""
    few_samples(monkeypatch)
    short_lists(monkeypatch)
    items = [start_of(ADAM, F32, like, device, (n, 7)) for n, like in
             ((1, "normal"), (300, "untouched rows"), (9, "constant"), (450, "few values"), (200, "constant"),
              (300, "normal"), (0, "normal"))]  # fmt: skip
    for i, item in enumerate(items):
        item.address = i
    how = {"rule": ADAM, "selection": Selection("top_k", fraction=0.4), "strength": Strength("fixed", 1.0, 0.0)}
    alone = [copied(item) for item in items]
    together = selective_step(items, statistics=True, draw=Draw(7, 3), backend="gpu", **how)
    for item, other, sums in zip(items, alone, together, strict=True):
        (single,) = selective_step([other], statistics=True, draw=Draw(7, 3), backend="gpu", **how)
        assert torch.equal(item.param, other.param)
        assert sums == single
