"""Small tensors that the CPU steps together get the bits that each gets alone; what does not fit is stepped alone."""

from __future__ import annotations

import sys

import pytest
import torch

from selective.kernels import AdamRule, Draw, GivenRule, LionRule, Selection, SGDRule, Strength, selective_step
from selective.kernels.cpu import chunks, together
from selective.kernels.cpu import selective_step as cpu_step
from selective.kernels.spec import StepSpec

EVERYTHING = {"selection": Selection("everything"), "draw": Draw(0, 0)}
FIXED = Strength("fixed")
SHAPES = [(3, 5), (64, 32), (1,), (), (7, 3, 2), (129,)]
RULES = [
    AdamRule(1e-2, 0.9, 0.99, 1e-8),
    AdamRule(1e-2, 0.9, 0.99, 1e-8, weight_decay=0.1, amsgrad=True),
    AdamRule(torch.tensor(-1e-2), 0.9, 0.99, 1e-8),
    SGDRule(0.1, 0.9),
    SGDRule(0.1, 0.9, nesterov=True, factor=0.9),
    GivenRule(1.0, negated=True),
    GivenRule(0.97, negated=True),
]


@pytest.fixture
def alone(monkeypatch):
    """The numbers of elements of the tensors that are stepped alone."""
    sizes = []
    module = sys.modules[cpu_step.__module__]
    real = module.Step
    monkeypatch.setattr(module, "Step", lambda item, *rest: (sizes.append(item.param.numel()), real(item, *rest))[1])
    return sizes


def made(make, rule, shapes=SHAPES):
    return [make(rule, shape, seed=2 * i + 1, address=i) for i, shape in enumerate(shapes)]


def assert_same_bits(items, others):
    for item, other in zip(items, others, strict=True):
        assert torch.equal(item.param, other.param)
        assert item.state.keys() == other.state.keys()
        for name in item.state:
            assert torch.equal(item.state[name], other.state[name]), name


@pytest.mark.parametrize("multiplier", [1.0, 0.7])
@pytest.mark.parametrize("rule", RULES)
def test_together_or_alone_the_bits_are_the_same(rule, multiplier, make, alone):
    together_items, others = made(make, rule), made(make, rule)
    strength = Strength("fixed", multiplier)
    for _ in range(2):
        selective_step(together_items, rule=rule, strength=strength, **EVERYTHING)
        assert alone == []
        selective_step(others, rule=rule, strength=strength, statistics=True, **EVERYTHING)  # each by itself
        assert alone == [item.param.numel() for item in others]
        alone.clear()
    assert_same_bits(together_items, others)


@pytest.mark.parametrize("rule", RULES)
def test_as_many_as_a_chunk_has_room_for(rule, make, alone, small_chunks):
    """Tensors of up to a chunk are divided among several calls. Larger ones are stepped alone."""
    room = together.chunk()
    shapes = [(5,), (7,), (6,), (room,), (room + 1,), (3, 2), (0,), (9,)]
    items, others = made(make, rule, shapes), made(make, rule, shapes)
    selective_step(items, rule=rule, strength=FIXED, **EVERYTHING)
    assert alone == [room + 1, 0]
    selective_step(others, rule=rule, strength=FIXED, statistics=True, **EVERYTHING)
    assert_same_bits(items, others)


def test_a_start_that_is_not_the_parameter(make, alone):
    rule = GivenRule(1.0, negated=True)
    items, others = made(make, rule), made(make, rule)
    for item in (*items, *others):
        item.state["start"] = torch.linspace(-1, 1, item.param.numel()).view(item.param.shape)
    selective_step(items, rule=rule, strength=FIXED, **EVERYTHING)
    assert alone == []
    selective_step(others, rule=rule, strength=FIXED, statistics=True, **EVERYTHING)
    assert_same_bits(items, others)


def test_awkward_tensors_among_the_others_are_stepped_alone(make, alone):
    """Of another dtype, with gaps in memory, or without the state that torch's kernel moves."""
    rule = SGDRule(0.1, 0.9)

    def mixed():
        items = made(make, rule, [(3, 5)] * 6)
        items[0].param = items[0].param.to(torch.bfloat16)
        items[1].param = items[1].param.t().contiguous().t()
        items[2].grad = items[2].grad.double()
        items[3].state["momentum_buffer"] = torch.cat([items[3].state["momentum_buffer"]] * 2, 1)[:, ::2]
        del items[4].state["momentum_buffer"]
        return items

    items, others = mixed(), mixed()
    selective_step(items, rule=rule, strength=FIXED, **EVERYTHING)
    assert len(alone) == 5
    selective_step(others, rule=rule, strength=FIXED, statistics=True, **EVERYTHING)
    assert_same_bits(items, others)


def uniform(rule=RULES[0], selection=EVERYTHING["selection"], strength=FIXED, statistics=False):
    return together.is_uniform(StepSpec(rule, selection, strength, Draw(0, 0), statistics))


def test_which_steps_are_taken_together():
    assert all(uniform(rule) for rule in RULES)
    refused = [
        uniform(LionRule(0.1, 0.9, 0.99)), uniform(SGDRule(0.1)), uniform(SGDRule(0.1, 0.9, weight_decay=0.1)),
        uniform(AdamRule(1e-2, 0.9, 0.99, 1e-8, maximize=True)), uniform(GivenRule(1.0)),
        uniform(GivenRule(1.0, 1.0, negated=True)), uniform(selection=Selection("agreement")),
        uniform(strength=Strength("alignment")), uniform(strength=Strength("fixed", still=True)),
        uniform(statistics=True),
    ]  # fmt: skip
    assert not any(refused)


def test_views_of_buffers_are_kept_until_the_buffer_grows():
    name, shapes = "a buffer of this test", [torch.Size([2, 3]), torch.Size([4])]
    flat, views = chunks.buffers(name, shapes)
    assert chunks.buffers(name, shapes)[1] is views
    assert [view.shape for view in views] == shapes
    flat.copy_(torch.arange(10.0))
    assert views[1].tolist() == [6, 7, 8, 9]
    grown = chunks.buffer(name, 2 * chunks.CHUNK)
    assert chunks.buffers(name, shapes)[0].data_ptr() == grown.data_ptr() != flat.data_ptr()
    del chunks._buffers.held[name, torch.float32]
    chunks._buffers.shaped.clear()
    chunks._buffers.exact.clear()


def test_few_sets_of_views_are_kept():
    for count in range(1, 3 * chunks.SHAPED):
        chunks.buffers("minus_update", [torch.Size([count])])
        assert len(chunks._buffers.shaped) <= chunks.SHAPED
