"""Controls that the CPU draws for several tensors together: each tensor's draw is its own, and sums are as exact."""

from __future__ import annotations

import sys

import pytest
import torch

from selective.kernels import AdamRule, Control, Draw, GivenRule, Item, Selection, SGDRule, Strength, selective_step
from selective.kernels.cpu import chunks
from selective.kernels.cpu import draw as cpu_draw
from selective.kernels.cpu import selective_step as cpu_step
from selective.kernels.cpu.chunks import Squares
from selective.kernels.reference.control import random_subset

EPS = torch.finfo(torch.float32).eps
ADAM = AdamRule(1e-2, 0.9, 0.99, 1e-8, weight_decay=0.1)
SIZES = [1, 7, 2_048, 0, 2_049, 3, 65_537, 1_024, 300_001, 5]
AGREEMENT = Selection("agreement", control=Control())
STRENGTHS = {
    "constants": Strength("fixed", 2.0, 0.5),
    "signs": Strength("fixed", 1.0, -1.0, still=True),
    "share": Strength("mean_preserving", cap=10.0),
}


def batches(monkeypatch) -> list[int]:
    """The number of tensors of each draw, as they are made from now on."""
    sizes: list[int] = []
    module = sys.modules[cpu_step.__module__]

    def noted(source, targets, marks):
        sizes.append(len(targets))
        return cpu_draw.draw(source, targets, marks)

    monkeypatch.setattr(module, "draw_marks", noted)
    return sizes


@pytest.mark.parametrize("piece", [1_024, 66_560, 1 << 22])
@pytest.mark.parametrize("share", [0.5, 0.003, 1.0])
def test_each_tensor_has_the_choice_that_it_has_alone(piece, share, monkeypatch) -> None:
    """Bit for bit, whichever tensors lie in a piece; coordinates that stand still are drawn last."""
    monkeypatch.setattr(cpu_draw, "PIECE", piece)
    drawn_together = batches(monkeypatch)
    generator = torch.Generator().manual_seed(1)
    items, wanted = [], []
    for address, n in enumerate(SIZES):
        grad = torch.ones(n) - 2 * (torch.rand(n, generator=generator) >= share).float()
        if address % 2:
            grad[::3] = 0.0  # stand still
        items.append(Item(torch.zeros(n), grad, {"update": torch.full((n,), 0.5), "start": torch.zeros(n)}, address))
        selected, still = grad > 0, grad == 0
        chosen = random_subset(selected, still, Draw(1, 7), address)
        wanted.append(torch.where(still, 0.0, torch.where(chosen, 1.0, -1.0)))
    strength = Strength("fixed", 1.0, -1.0, still=True)
    selective_step(items, rule=GivenRule(), selection=AGREEMENT, strength=strength, draw=Draw(1, 7), backend="cpu")
    for item, signs in zip(items, wanted, strict=True):
        assert torch.equal(item.param, -0.5 * signs)
    assert drawn_together == [8, 1, 1]  # no more elements lie together than 300,001


@pytest.mark.parametrize("kind", STRENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_together_are_stepped_as_in_the_definition(kind, dtype, make, copy) -> None:
    ours = [make(ADAM, (n,), dtype=dtype, seed=n, address=n) for n in SIZES]
    ours.append(make(ADAM, (70, 90), dtype=dtype, seed=9, address=99))
    turned = ours[-1]
    ours[-1] = Item(turned.param.t(), turned.grad.t(), {k: v.t() for k, v in turned.state.items()}, 99)
    theirs = [copy(item) for item in ours]
    kw = {"rule": ADAM, "selection": AGREEMENT, "strength": STRENGTHS[kind], "draw": Draw(3, 4), "statistics": True}
    mine = selective_step(ours, backend="cpu", **kw)
    reference = selective_step(theirs, backend="reference", **kw)
    for a, b, sums, wanted in zip(ours, theirs, mine, reference, strict=True):
        assert float(sums.selected) == float(wanted.selected)
        torch.testing.assert_close(sums.masked_sq, wanted.masked_sq, rtol=6e-6, atol=1e-12)  # as in `assert_same`
        scale = torch.maximum(a.param.abs(), b.param.abs()).float() + 0.1
        one = 2**-7 if dtype == torch.bfloat16 else 8 * EPS  # one neighbour in bfloat16
        assert bool(((a.param - b.param).abs() <= one * scale + 6e-7).all())


def test_memory_of_several_tensors_is_that_of_the_largest(monkeypatch) -> None:
    made = []
    module = sys.modules[cpu_step.__module__]

    class Watched(chunks.Scratch):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(module, "Scratch", Watched)
    items = [Item(torch.zeros(n), torch.ones(n), {}, n) for n in (10, 5_000, 300, 700, 4_096)]
    strength = Strength("fixed", 2.0, 0.5)
    kw = {"rule": SGDRule(1.0), "selection": AGREEMENT, "strength": strength, "draw": Draw(0, 0)}
    selective_step(items, backend="cpu", **kw)
    assert sum(t.numel() * t.element_size() for t in made[0].held.values()) == 5 * cpu_draw.room(5_000)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_signs_of_updates_that_are_not_finite(bad, make, copy) -> None:
    """An infinite update keeps one of its two signs, and is no NaN; a NaN is selected nowhere, and moves."""
    item = make(GivenRule(), (40, 100))
    item.state["update"][3, :20] = bad
    item.grad[5, ::3] = 0.0
    other = copy(item)
    kw = {"rule": GivenRule(), "selection": AGREEMENT, "draw": Draw(3, 4), "statistics": True}
    (ours,) = selective_step([item], strength=STRENGTHS["signs"], backend="cpu", **kw)
    (wanted,) = selective_step([other], strength=STRENGTHS["signs"], backend="reference", **kw)
    assert float(ours.selected) == float(wanted.selected)
    torch.testing.assert_close(item.param, other.param, rtol=0, atol=4 * EPS, equal_nan=True)


@pytest.mark.parametrize("value", [0.99999, 1e-3, 0.7, 0.31622])
@pytest.mark.parametrize("backwards", [True, False])
def test_squares_of_many_chunks_add_up(value, backwards) -> None:
    """Those of Adam's first step are equal, so that all roundings of a running sum go one way."""
    pieces = [torch.full((n,), value) for n in [100_000] * 20 + [777]]
    squares = Squares()
    for piece in reversed(pieces) if backwards else pieces:
        squares.add(piece)
    exact = sum(float(piece.double().square().sum()) for piece in pieces)
    assert abs(squares.take() / exact - 1) < 1e-6
    running = torch.zeros(1)
    for _ in range(2_000):
        running.addcmul_(pieces[0][:1], pieces[0][:1])
    assert abs(float(running) / (2_000 * float(pieces[0][:1].double().square())) - 1) > 1e-6  # the twin: never summed


@pytest.mark.parametrize("kind", ["fixed", "signs", "alignment", "top_k"])
def test_a_step_leaves_no_tensor_of_inference_mode(kind, make) -> None:
    """Parts of a control's step are in it. torch refuses to write to its tensors outside, as the next step would."""
    strength = {"signs": STRENGTHS["signs"], "alignment": Strength("alignment", rest=0.5)}.get(kind)
    selection = Selection("top_k", fraction=0.3, control=Control()) if kind == "top_k" else AGREEMENT
    items = [make(ADAM, (n,), seed=n, address=n) for n in (7, 2_049, 300_001)]
    chunks._buffers.held.clear()  # so that this step makes them
    chunks._buffers.exact.clear()
    kw = {"rule": ADAM, "selection": selection, "strength": strength or STRENGTHS["constants"], "statistics": True}
    sums = selective_step(items, draw=Draw(3, 4), backend="cpu", **kw)
    kept = [t for item in items for t in (item.param, *item.state.values(), *item.policy_state.values())]
    kept += [x for row in sums for x in vars(row).values() if isinstance(x, torch.Tensor)]
    kept += [*chunks._buffers.held.values(), *chunks._buffers.exact.values()]
    assert len(kept) > 20
    assert not any(t.is_inference() for t in kept)
    with torch.inference_mode():
        assert torch.empty(1).is_inference()  # the twin: what is made there without care
    selective_step(items, draw=Draw(3, 5), backend="cpu", **kw)


def test_counts_of_segments() -> None:
    """Exact where all marks of a row are set, and for segments that hold nothing."""
    generator = torch.Generator().manual_seed(2)
    sizes = [cpu_draw.ROW, 3 * cpu_draw.ROW, 70 * cpu_draw.ROW, cpu_draw.ROW]
    marks = (torch.rand(sum(sizes), generator=generator) < 0.3).to(torch.uint8)
    marks[: sizes[0]] = 1
    marks[-sizes[3] :] = 0
    wanted = [int(part.sum()) for part in marks.split(sizes)]
    assert cpu_draw._counts(marks, sizes) == wanted
    assert cpu_draw._counts(marks, [marks.numel()]) == [sum(wanted)]
