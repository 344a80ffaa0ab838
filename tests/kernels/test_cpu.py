"""The CPU path where it differs from the reference in kind: chunks, layouts, buffers, torch's fused kernels."""

from __future__ import annotations

import itertools

import pytest
import torch

from selective.kernels import (
    AdamRule,
    Control,
    Draw,
    GivenRule,
    Item,
    LionRule,
    Selection,
    SGDRule,
    Strength,
    selective_step,
)
from selective.kernels.cpu import chunks
from selective.kernels.cpu import rules as moments
from selective.kernels.cpu.chunks import CHUNK

EPS = torch.finfo(torch.float32).eps
ADAM = AdamRule(1e-2, 0.9, 0.99, 1e-8, weight_decay=0.1)
RULES = [ADAM, AdamRule(1e-2, 0.9, 0.99, 1e-8, amsgrad=True), SGDRule(0.1, 0.9), LionRule(1e-2, 0.9, 0.99)]
CASES = [
    (Selection("agreement"), Strength("fixed", 1.5, 0.5)),
    (Selection("agreement", product="previous_momentum"), Strength("norm_preserving", of="momentum")),
    (Selection("agreement"), Strength("mean_preserving", estimate="sampled")),
    (Selection("top_k"), Strength("fixed", 2.0, 0.5)),
    (Selection("top_k", score="momentum", fraction=0.3), Strength("norm_preserving", of="gradient")),
    (Selection("top_k", quantile="sampled"), Strength("alignment")),
    (Selection("bernoulli"), Strength("fixed", 2.0, 0.0)),
    (Selection("bernoulli", unit="row"), Strength("norm_preserving", estimate="sampled")),
    (Selection("agreement", control=Control()), Strength("mean_preserving", estimate="sampled")),
    (Selection("top_k", fraction=0.3, control=Control()), Strength("fixed", 1.0, -1.0, still=True)),
]


def both(item: Item, copy, rule, selection, strength):
    other = copy(item)
    kw = {"rule": rule, "selection": selection, "strength": strength, "draw": Draw(3, 4), "statistics": True}
    (a,) = selective_step([item], backend="cpu", **kw)
    (b,) = selective_step([other], backend="reference", **kw)
    return other, a, b


def assert_same(item, other, sums, wanted):
    """Equal to rounding, apart from coordinates whose product or score is within rounding of the border."""
    scale = torch.maximum(item.param.abs(), other.param.abs()) + 0.1
    apart = (item.param - other.param).abs() > 8 * EPS * scale  # 4 eps of each path's own arithmetic
    assert apart.sum() <= 4 + 1e-5 * item.param.numel()
    assert abs(float(sums.selected - wanted.selected)) <= 4 + 1e-5 * item.param.numel()
    for key in other.state:
        assert torch.allclose(item.state[key], other.state[key], rtol=8 * EPS, atol=8 * EPS)


@pytest.mark.parametrize("selection, strength", CASES)
@pytest.mark.parametrize("shape", [(0,), (), (1,), (63,), (11, 71), (1823,), (3, 0, 5), (CHUNK - 1,), (CHUNK + 1,)])
def test_hostile_shapes(shape, selection, strength, make, copy):
    for rule in RULES:
        item = make(rule, shape, seed=2)
        assert_same(item, *both(item, copy, rule, selection, strength))


def _views(make, rule):
    """The same parameter in awkward memory: transposed, strided, a slice; gradients of another layout and dtype."""
    item = make(rule, (24, 30), seed=2)

    def strided(t):
        room = torch.zeros(48, 60, dtype=t.dtype)
        room[::2, 1::2] = t
        return room[::2, 1::2]

    def transposed(t):
        return t.t().contiguous().t()

    layouts = (strided, transposed, torch.Tensor.contiguous)
    for place, grad_place in itertools.product(layouts, layouts):
        state = {k: v if k == "step" else place(v) for k, v in item.state.items()}
        yield Item(place(item.param), grad_place(item.grad.bfloat16()), {k: v.clone() for k, v in state.items()}, 5)
    yield Item(item.param.clone(), torch.ones(()).expand(24, 30), {k: v.clone() for k, v in item.state.items()}, 5)


@pytest.mark.parametrize("selection, strength", CASES)
def test_layouts_write_through(selection, strength, make, copy, small_chunks):
    for rule in RULES:
        for item in _views(make, rule):
            storage = item.param.untyped_storage().data_ptr()
            assert_same(item, *both(item, copy, rule, selection, strength))
            assert item.param.untyped_storage().data_ptr() == storage


def test_a_strided_view_leaves_its_neighbours_alone(make):
    room = torch.zeros(48, 60)
    item = Item(room[::2, 1::2], torch.ones(24, 30), make(ADAM, (24, 30)).state, 0)
    selective_step(
        [item], rule=ADAM, selection=Selection("top_k"), strength=Strength("fixed", 2.0, 0.5), draw=Draw(0, 0)
    )
    assert (room != 0).sum() == 24 * 30
    assert (room[::2, 1::2] != 0).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("selection, strength", CASES)
def test_no_uninitialised_memory_is_read(backend, selection, strength, make, copy, small_chunks, monkeypatch):
    """torch.empty gives NaN (true, 77): results stay what they were."""
    real, real_like = torch.empty, torch.empty_like

    def poison(t):
        return t.fill_(torch.nan if t.is_floating_point() else 77)

    rules = [*RULES, GivenRule(), GivenRule(negated=True, offset=1.0)]
    clean = [make(rule, (30, 7)) for rule in rules]
    dirty = [copy(item) for item in clean]
    for poisoned, items in ((False, clean), (True, dirty)):
        if poisoned:
            monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(real(*a, **k)))
            monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(real_like(*a, **k)))
        monkeypatch.setattr(chunks, "_buffers", chunks._Buffers())
        for rule, item in zip(rules, items, strict=True):
            selective_step([item], rule=rule, selection=selection, strength=strength, draw=Draw(0, 0), backend=backend)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a.param, b.param)
        assert not a.param.isnan().any()


@pytest.mark.parametrize("selection, strength", CASES)
def test_the_same_again_is_the_same_bits(selection, strength, make, copy):
    for rule in RULES:
        one = make(rule, (CHUNK + 5,))
        two = copy(one)
        for item in (one, two):
            selective_step([item], rule=rule, selection=selection, strength=strength, draw=Draw(0, 0))
        assert torch.equal(one.param, two.param)


def test_many_items_of_mixed_dtypes_equal_each_alone(make, copy):
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    items = [make(ADAM, (n,), dtype, seed=n, address=n) for n, dtype in zip((700, 5, 90, 300), dtypes, strict=True)]
    alone = [copy(item) for item in items]
    for selection, strength in CASES:
        kw = {"rule": ADAM, "selection": selection, "strength": strength, "draw": Draw(0, 0)}
        together = selective_step(items, statistics=True, **kw)
        for item, sums in zip(alone, together, strict=True):
            assert selective_step([item], statistics=True, **kw) == [sums]
    for a, b in zip(items, alone, strict=True):
        assert torch.equal(a.param, b.param)


def test_fused_kernels_are_used_where_they_agree_and_only_there(make, copy, monkeypatch):
    calls = []
    for name in ("_run_adam", "_run_sgd"):
        real = getattr(moments, name)
        monkeypatch.setattr(moments, name, lambda *a, name=name, real=real: (calls.append(name), real(*a)))
    moments._trusted.cache_clear()
    kw = {"selection": Selection("agreement"), "strength": Strength("fixed"), "draw": Draw(0, 0)}

    def used(item, rule):
        calls.clear()
        selective_step([item], rule=rule, **kw)
        return set(calls)

    assert used(make(ADAM, (50,)), ADAM) == {"_run_adam"}
    assert used(make(SGDRule(0.1, 0.9), (50,)), SGDRule(0.1, 0.9)) == {"_run_sgd"}
    assert used(make(ADAM, (50,), torch.bfloat16), ADAM) == set()
    assert used(make(SGDRule(0.1), (50,)), SGDRule(0.1)) == set()
    # A build whose kernel computes something else is found out, and left.
    moments._trusted.cache_clear()
    theirs = moments._FUSED_ADAM
    monkeypatch.setattr(moments, "_FUSED_ADAM", lambda *a, **k: theirs(*a, **(k | {"eps": 1e-3})))
    assert moments._trusted(AdamRule(1e-2, 0.9, 0.99, 1e-8)) is False
    monkeypatch.setattr(moments, "_FUSED_ADAM", None)
    moments._trusted.cache_clear()
    item = make(ADAM, (50,))
    assert_same(item, *both(item, copy, ADAM, Selection("agreement"), Strength("fixed")))
    moments._trusted.cache_clear()


@pytest.fixture
def torch_threads():
    """Sets torch's number of threads, and puts it back."""
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)


def test_a_chunk_grows_with_the_threads_up_to_a_bound(torch_threads):
    sizes = []
    for count in (1, 2, 3, 4, 5, 16):
        torch_threads(count)
        sizes.append(chunks.chunk() // CHUNK)
        assert next(chunks.spans(10 * CHUNK)) == (0, chunks.chunk())
    assert sizes == [1, 2, 3, 4, 4, 4]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_another_number_of_threads_is_followed_from_step_to_step(case, make, copy, torch_threads, monkeypatch):
    """Chunks, buffers and kept parts of them have other sizes in the second step, and the first ones in the third."""
    monkeypatch.setattr(chunks, "CHUNK", 1_024)
    selection, strength = CASES[case]
    item = make(ADAM, (7, 1_001), seed=8)
    other = copy(item)
    kw = {"rule": ADAM, "selection": selection, "strength": strength, "draw": Draw(3, 4)}
    for count in (2, 1, 4, 2):
        torch_threads(count)
        selective_step([item], backend="cpu", **kw)
        selective_step([other], backend="reference", **kw)
    scale = torch.maximum(item.param.abs(), other.param.abs()) + 0.1
    apart = (item.param - other.param).abs() > 4 * 8 * EPS * scale + 4 * 6e-7  # of four steps, see `test_control.py`
    assert apart.sum() <= 4 * 4  # see `assert_same`


def test_scratch_is_of_the_largest_tensor_and_nothing_is_kept(make, monkeypatch):
    """The documented memory: 4 bytes an element for d, 1 for marks; allocated once for all tensors."""
    made = []
    real = chunks.Scratch

    class Watched(real):
        def __init__(self):
            super().__init__()
            made.append(self)

    from selective.kernels.cpu import selective_step as module_name  # the function shadows its module

    module = __import__("sys").modules[module_name.__module__]
    monkeypatch.setattr(module, "Scratch", Watched)
    buffers = chunks._Buffers()  # its own: the process's hold what the tests before this one needed
    monkeypatch.setattr(chunks, "_buffers", buffers)
    items = [make(ADAM, (n,)) for n in (10, 5000, 300)]
    kw = {"rule": ADAM, "draw": Draw(0, 0)}
    wanted = [
        (Selection("agreement"), Strength("fixed"), 0),
        (Selection("top_k"), Strength("fixed"), 4 * 5000),
        (Selection("agreement"), Strength("mean_preserving"), 5 * 5000),
        (Selection("top_k", score="momentum"), Strength("norm_preserving", of="momentum"), 13 * 5000),
    ]
    for selection, strength, most in wanted:
        made.clear()
        selective_step(items, selection=selection, strength=strength, **kw)
        assert sum(t.numel() * t.element_size() for t in made[0].held.values()) == most
    kept = sum(t.numel() * t.element_size() for t in buffers.held.values() if t.dtype == torch.float32)
    assert 0 < kept <= 10 * 4 * CHUNK
