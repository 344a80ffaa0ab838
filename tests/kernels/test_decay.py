"""Decoupled decay that reaches chosen coordinates, by every implementation of the step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cut_up import cut
from gpu_support import few_samples, missing_brackets
from hypothesis import given, settings
from hypothesis import strategies as st
from step_cases import KINDS, RULES

from selective.kernels import (
    AdamRule,
    Decay,
    Draw,
    GivenRule,
    Item,
    LionRule,
    Rule,
    SGDRule,
    apply_mask,
    begin_sharded,
    decaying,
    drawn_like,
    selective_step,
    uniform_bits,
)
from selective.kernels.reference.random import STREAM_DECAY

DECAYING: dict[str, Rule] = {  # rules with a factor of decoupled decay
    "adamw": RULES["adamw"],
    "sgd": SGDRule(0.1, 0.9, nesterov=True, factor=0.9),
    "lion": RULES["lion"],
    "given": RULES["scratch"],
}
OF: tuple[Any, ...] = ("update", "masked", "gradient")
BACKENDS: tuple[Any, ...] = ("reference", "cpu", "gpu")


def undecayed(rule: Rule) -> Rule:
    if isinstance(rule, AdamRule):
        return replace(rule, weight_decay=0.0)
    if isinstance(rule, LionRule):
        return replace(rule, decay_factor=1.0)
    return replace(rule, factor=1.0)


def with_zeros(item: Item) -> Item:
    """Some coordinates stand still, and some parameters are 0."""
    for name in ("exp_avg", "momentum_buffer", "update"):
        if name in item.state:
            item.state[name].view(-1)[::5] = 0
    item.grad.view(-1)[::5] = 0
    item.param.view(-1)[::7] = 0
    if "start" in item.state:
        item.state["start"].copy_(item.param)
    return item


CELLS = [  # each rule with each kind of launches, and each of both with each `of`; half of them in the ordinary suite
    pytest.param(name, kind, OF[(i + j) % 3], marks=pytest.mark.slow if (i + j) % 2 else [])
    for i, name in enumerate(DECAYING)
    for j, kind in enumerate(KINDS)
]


@pytest.mark.parametrize("name,kind,of", CELLS)
def test_each_coordinate_takes_one_of_two_steps(name, kind, of, device, make, copy, monkeypatch):
    """Bit for bit, by every path. Which one it takes is what the reference says, except within rounding of 0."""
    few_samples(monkeypatch)
    index = list(KINDS).index(kind)
    rule, strict = DECAYING[name], bool(index % 2)
    start = with_zeros(make(rule, (700,), seed=1))
    how: dict[str, Any] = {"selection": KINDS[kind][0], "strength": KINDS[kind][1], "draw": Draw(1, 2)}
    answers = []
    for backend in BACKENDS:
        where = device if backend == "gpu" else "cpu"
        ends = []
        for decay, moves in ((Decay(of=of, strict=strict), rule), (None, rule), (None, undecayed(rule))):
            item = copy(start)
            item = Item(
                item.param.to(where), item.grad.to(where), {k: v.to(where) for k, v in item.state.items()}, 5,
                {k: v.to(where) for k, v in item.policy_state.items()},
            )  # fmt: skip
            selective_step([item], rule=moves, decay=decay, backend=backend, **how)
            ends.append(item.param.cpu())
        mine, decayed, undecayed_ = ends
        assert bool(((mine == decayed) | (mine == undecayed_)).all())
        answers.append((mine == decayed) & (decayed != undecayed_))
    for answer in answers[1:]:
        assert int((answer != answers[0]).sum()) <= 2
    assert 100 < int(answers[0].sum()) < 600


@pytest.mark.parametrize("of", ["update", "masked"])
def test_a_bracket_that_misses_is_repaired_with_the_right_decay(of, device, make, copy, monkeypatch):
    """A coordinate that is selected after all has the masked update that it has then, and decays by that."""
    few_samples(monkeypatch)
    missing_brackets(monkeypatch)
    rule = AdamRule(1e-2, 0.9, 0.99, 1e-8, weight_decay=10.0)
    start = with_zeros(make(rule, (2300,), seed=1))
    how: dict[str, Any] = {"selection": KINDS["top_k"][0], "strength": replace(KINDS["top_k"][1], rest=0.0)}
    ends = []
    for backend in ("reference", "gpu"):
        item, where = copy(start), device if backend == "gpu" else "cpu"
        item = Item(item.param.to(where), item.grad.to(where), {k: v.to(where) for k, v in item.state.items()}, 5)
        decay: Any = Decay(of=of, strict=True)
        selective_step([item], rule=rule, decay=decay, draw=Draw(1, 2), backend=backend, **how)
        ends.append(item.param.cpu())
    # decay takes a tenth; an update, and a correction of it, are some hundredths
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(width=32), st.floats(width=32, allow_nan=False)), min_size=1, max_size=8),
    st.booleans(),
    st.booleans(),
)
def test_signs_decide_and_nothing_underflows(pairs, strict, climbs):
    """Any floats, subnormal and infinite ones too. Where the parameter is 0 or the update NaN, nothing follows."""
    u, p = (torch.tensor(x, dtype=torch.float32) for x in zip(*pairs, strict=True))
    rule = GivenRule(0.5, rate=-1.0 if climbs else 1.0)
    item = Item(p.clone(), u, {"update": u, "start": p}, 0)
    found = decaying(Decay(strict=strict), item, rule, u, torch.ones_like(u), u)
    for i, (x, theta) in enumerate(pairs):
        x = -x if climbs else x
        if theta != 0 and x == x:
            same = (x > 0) == (theta > 0) if x != 0 else not strict
            assert bool(found[i]) == same


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_decay_as_the_whole(dim, backend):
    generator = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(9, 7, generator=generator) for _ in range(2))
    how: dict[str, Any] = {
        "rule": SGDRule(0.1, factor=0.5), "selection": KINDS["agreement"][0], "draw": Draw(3, 4),
        "strength": KINDS["agreement"][1], "decay": Decay(),
    }  # fmt: skip
    whole = Item(start.clone(), grad, {}, 5)
    selective_step([whole], **how, backend="reference")
    assert 0 < int((whole.param.abs() < 0.7 * start.abs()).sum()) < start.numel()
    for (part, shard), (g, _), (wanted, _) in zip(
        cut(start, dim, 4), cut(grad, dim, 4), cut(whole.param, dim, 4), strict=True
    ):
        mine = Item(part.clone(), g.clone(), {}, 5, shard=shard)
        for step in begin_sharded([mine], **how, backend=backend):
            step.resume()
        torch.testing.assert_close(mine.param, wanted, rtol=2.0**-22, atol=1e-8)  # one multiply-add is fused, or not


def test_random_coordinates_are_as_many_by_address_in_a_stream_of_their_own():
    draw, start = Draw(1, 2), torch.zeros(200, 300)
    chosen = torch.rand(200, 300, generator=torch.Generator().manual_seed(0)) < 0.2
    found = drawn_like(chosen, chosen.sum(), chosen.numel(), draw, 7, None)
    share = float(chosen.float().mean())
    deviation = (share * (1 - share) / chosen.numel()) ** 0.5  # binomial
    assert abs(float(found.float().mean()) - share) < 5 * deviation
    masks = uniform_bits(draw, 7, chosen.numel()).reshape(chosen.shape) < int(0.5 * 2**24)
    assert abs(float(found[masks].float().mean()) - share) < 5 * deviation * 2**0.5
    own = uniform_bits(draw, 7, chosen.numel(), stream=STREAM_DECAY).reshape(chosen.shape)
    assert torch.equal(found, own < share * 2**24)
    for dim in (0, 1):
        for part, shard in cut(found, dim, 3):
            mine = drawn_like(torch.zeros_like(part), chosen.sum(), chosen.numel(), draw, 7, shard)
            assert torch.equal(mine, part)
    for count in (0, chosen.numel()):
        assert int(drawn_like(chosen, torch.tensor(count), chosen.numel(), draw, 7, None).sum()) == count
    assert start.numel() == chosen.numel()


def test_the_choice_is_made_before_the_one_write():
    """In bfloat16, to decay and to add back is another number; the failing twin."""
    p = torch.linspace(0.5, 2, 500).bfloat16()
    u = torch.full((500,), -1e-4)  # grows p: no decay
    item = Item(p.clone(), u, {"update": u, "start": p.clone()}, 0)
    rule = GivenRule(0.99)
    decays = decaying(Decay(), item, rule, u, torch.ones_like(u), u)
    apply_mask(item, rule, u, torch.ones_like(u), decays=decays)
    assert torch.equal(item.param, (p.float() - u).bfloat16())
    twice = (p.float() * 0.99 - u).bfloat16()
    assert not torch.equal((twice.float() + 0.01 * p.float()).bfloat16(), item.param)


def test_a_start_after_the_step_is_refused():
    item = Item(torch.ones(3), torch.ones(3), {"update": torch.ones(3), "start": torch.ones(3)}, 0)
    how: dict[str, Any] = {"selection": KINDS["agreement"][0], "strength": KINDS["agreement"][1], "draw": Draw(0, 0)}
    with pytest.raises(ValueError, match="reads the parameter before the step"):
        selective_step([item], rule=GivenRule(offset=1.0), decay=Decay(), **how)
    selective_step([item], rule=GivenRule(offset=0.0), decay=Decay(), **how)
