"""Shards of many tensors in one go are what they are one tensor after the other: with several ranks in this process.

A part of a sharded step is a generator that yields what it adds to a sum and is sent the sum, so that ranks need no
processes: they take turns. `tests/sharded` runs the same over gloo, against whole tensors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from selective.kernels import AdamRule, Draw, Item, ItemList, LionRule, Selection, SGDRule, Strength, selective_step
from selective.kernels.reference.selective_step import selective_step as reference_step
from selective.kernels.sharded import counting, joinable, slices
from selective.kernels.sharded import selective_step as stepping
from selective.kernels.sharded.how import How
from selective.kernels.sharded.joinable import can_be
from selective.kernels.sharded.selective_step import sharded_step
from selective.kernels.spec import Rule, Shard, Sums

ADAM = AdamRule(1e-2, 0.9, 0.99, 1e-8, weight_decay=0.1)
RULES: dict[str, Rule] = {
    "adamw": ADAM,
    "maximize": replace(ADAM, maximize=True),
    "amsgrad": replace(ADAM, amsgrad=True),
    "nesterov": SGDRule(0.1, 0.9, nesterov=True),
    "sgd": SGDRule(0.1),
    "lion": LionRule(0.1, 0.9, 0.99, decay_factor=0.99),
}
SHAPES = [(7, 5), (2, 3), (12,), (1, 4), (9, 2, 2)]  # on four ranks some have nothing of the second and fourth
FIXED, MEAN = Strength("fixed", 2.0, 0.5), Strength("mean_preserving", rest=0.1, cap=3.0)


@pytest.fixture(autouse=True)
def _on_a_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joinable, "JOINED", {"cpu", "cuda"})


def values(shape: tuple[int, ...], seed: int, kind: str) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if kind == "ties":
        return (x * 1.5).round() / 2
    if kind == "zeros":
        return torch.where(x > 1, x, 0.0)
    if kind == "strange":
        return torch.where(x > 1.5, torch.nan, torch.where(x < -1.5, torch.inf, x))
    return x


def state_of(rule: Rule, shape: tuple[int, ...], seed: int, kind: str) -> dict[str, Tensor]:
    momentum = values(shape, 100 + seed, kind if kind != "strange" else "plain")
    if kind == "first" and seed % 2:
        momentum = torch.zeros_like(momentum)
    if isinstance(rule, SGDRule):
        return {"momentum_buffer": momentum} if rule.momentum else {}
    if isinstance(rule, LionRule):
        return {"exp_avg": momentum}
    found = {"exp_avg": momentum, "exp_avg_sq": momentum.square() + 0.1}
    found |= {"max_exp_avg_sq": momentum.square() + 0.2} if rule.amsgrad else {}  # type: ignore[union-attr]
    return found


def shards(rule: Rule, ranks: int, kind: str, dtype: torch.dtype, seed: int = 0) -> list[ItemList]:
    """For each rank its rows of all tensors, as `fully_shard` cuts them."""
    found = [ItemList() for _ in range(ranks)]
    for address, shape in enumerate(SHAPES):
        whole = {"param": values(shape, seed, "plain").to(dtype), "grad": values(shape, seed + 50, kind).to(dtype)}
        whole |= state_of(rule, shape, seed, kind)
        seed += 1
        size = -(-shape[0] // ranks)
        for rank in range(ranks):
            start, stop = min(rank * size, shape[0]), min((rank + 1) * size, shape[0])
            here = {name: x[start:stop].clone() for name, x in whole.items()}
            run = ((start, stop - start),) if stop > start else ()
            runs = (run, *(((0, n),) for n in shape[1:]))
            shard = Shard(shape, runs, None, pieces=ranks, places=(rank,), stretches=True, row_stretches=True)
            param, grad = here.pop("param"), here.pop("grad")
            step = {"step": torch.tensor(3.0)} if isinstance(rule, AdamRule) else {}
            found[rank].append(Item(param, grad, {**here, **step}, address, {}, shard))
    return found


def run(ranks: list[ItemList], local_step: Any, **how: Any) -> tuple[list[list[Sums]], list[int]]:
    """All ranks' sums, and how much each round sends."""
    parts = [sharded_step(items, draw=Draw(1, 2), local_step=local_step, **how) for items in ranks]
    assert all(len(part) == 1 for part in parts)
    steps, sent = [part[0] for part in parts], []
    for one in steps:
        one.go_on()
    while steps[0].asked is not None:
        questions = [one.asked for one in steps]
        total = torch.stack([q for q in questions if q is not None]).sum(0, dtype=torch.int32)
        sent.append(total.numel())
        for one in steps:
            one.go_on(total.clone())
    assert all(one.asked is None for one in steps)
    return [list(one.result or []) for one in steps], sent


def both(ranks: list[ItemList], twin: list[ItemList], local_step: Any, **how: Any) -> tuple[Any, Any]:
    assert all(can_be(item, _how(how)) for items in ranks for item in items)
    first = run(ranks, local_step, **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepping, "can_be", lambda item, how: False)
        return first, run(twin, local_step, **how)


def _how(how: dict[str, Any]) -> How:
    return How(draw=Draw(1, 2), **how)


def assert_same(ranks: list[ItemList], twin: list[ItemList]) -> None:
    for ours, theirs in zip(ranks, twin, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.param, b.param, rtol=0, atol=0, equal_nan=True)
            for name in a.state:
                torch.testing.assert_close(a.state[name], b.state[name], rtol=0, atol=0, equal_nan=True)


def assert_same_sums(ours: list[list[Sums]], theirs: list[list[Sums]]) -> None:
    """Sums in another order: 64 roundings of float64."""
    for a, b in zip(ours, theirs, strict=True):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            for name in vars(one):
                x, y = (torch.as_tensor(getattr(s, name), dtype=torch.float64) for s in (one, other))
                torch.testing.assert_close(x, y, rtol=64 * 2**-52, atol=1e-12, equal_nan=True, msg=name)


TOP_K, LOOSE = Selection("top_k", fraction=0.4), Selection("agreement", strict=False)
PREVIOUS, MOMENTUM = (Selection("agreement", product=x) for x in ("previous_momentum", "momentum"))  # type: ignore[arg-type]
NORM = Strength("norm_preserving", rest=0.2, cap=3.0)
CASES = {
    "top_k": (TOP_K, FIXED), "top_k, mean": (TOP_K, MEAN), "top_k, norm": (TOP_K, NORM),
    "top_k, norm of momentum": (TOP_K, replace(NORM, of="momentum")), "update, mean": (LOOSE, MEAN),
    "update, norm of gradient": (LOOSE, replace(NORM, of="gradient")), "momentum, mean": (MOMENTUM, MEAN),
    "previous": (PREVIOUS, FIXED), "previous, norm of momentum": (PREVIOUS, replace(NORM, of="momentum")),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["plain", "ties", "zeros", "strange", "first"])
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_same_bits(case: str, statistics: bool, kind: str, rule: str) -> None:
    """Of parameters and state, by the reference kernels on both sides; and it sends as much."""
    selection, strength = CASES[case]
    if rule == "sgd" and (selection.product != "update" or strength.of == "momentum"):
        return  # it has no momentum
    how = {"rule": RULES[rule], "selection": selection, "strength": strength, "statistics": statistics}
    for ranks in (1, 3, 4):
        ours, theirs = (shards(RULES[rule], ranks, kind, torch.float32) for _ in range(2))
        (mine, sent), (other, sent_by_it) = both(ours, theirs, reference_step, **how)
        assert_same(ours, theirs)
        assert sent == sent_by_it
        assert_same_sums(mine, other)
        assert all(len(one) == (len(SHAPES) if statistics else 0) for one in mine)


@settings(max_examples=40)
@given(
    fraction=st.floats(0.05, 1), case=st.sampled_from(["top_k", "previous, norm of momentum"]),
    ranks=st.integers(1, 5), seed=st.integers(0, 10**6), part=st.integers(1, 60),
    kind=st.sampled_from(["plain", "ties", "zeros", "strange"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_drawn(fraction: float, case: str, ranks: int, seed: int, part: int, kind: str, dtype: torch.dtype) -> None:
    """Several steps, in parts of any size, with the kernels that a CPU takes; to their rounding."""
    selection, strength = CASES[case]
    how = {"rule": ADAM, "selection": replace(selection, fraction=fraction), "strength": strength, "statistics": False}
    ours, theirs = (shards(ADAM, ranks, kind, dtype, seed) for _ in range(2))
    if case == "top_k" and any(int(fraction * torch.Size(shape).numel()) == 0 for shape in SHAPES):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "PART", part)
        for step in range(2):
            both(ours, theirs, selective_step, **how)
            for rank, twin in zip(ours, theirs, strict=True):
                for a, b in zip(rank, twin, strict=True):
                    tolerance = 2 * torch.finfo(dtype).eps
                    torch.testing.assert_close(a.param, b.param, rtol=tolerance, atol=1e-6, equal_nan=True)
                    fresh = values(tuple(a.grad.shape), seed + 7 * step, kind).to(dtype)
                    a.grad, b.grad = fresh, fresh.clone()


def test_replicas_are_counted_once() -> None:
    """Two ranks with the same rows: the second adds nothing, and gets the same."""
    results = []
    for copies in (1, 2):
        ranks = [shards(ADAM, 1, "ties", torch.float32)[0] for _ in range(copies)]
        for items in ranks[1:]:
            for item in items:
                assert item.shard is not None
                item.shard = replace(item.shard, counted=False)
        how = {"rule": ADAM, "selection": Selection("top_k"), "strength": MEAN, "statistics": True}
        sums, _ = run(ranks, reference_step, **how)
        results.append((ranks[-1], sums[-1]))
    (first, its), (last, theirs) = results
    assert_same([first], [last])
    assert_same_sums([its], [theirs])


@pytest.mark.parametrize(
    "change",
    [
        {"rule": replace(ADAM, decoupled=False)},
        {"selection": Selection("top_k", score="momentum")},
        {"selection": Selection("top_k", quantile="sampled")},
        {"selection": Selection("top_k", fraction=0.01)},
        {"strength": Strength("alignment")},
        {"strength": replace(MEAN, estimate="sampled")},
        {"strength": replace(FIXED, still=True)},
        {"rule": replace(ADAM, lr=torch.tensor(0.1)), "selection": Selection("bernoulli")},
    ],
)
def test_what_is_left_to_the_other_way(change: dict[str, Any]) -> None:
    how = {"rule": ADAM, "selection": Selection("top_k"), "strength": MEAN, "statistics": False}
    item = shards(ADAM, 2, "plain", torch.float32)[0][0]
    assert can_be(item, _how(how))
    assert not can_be(item, _how(how | change))
    assert item.shard is not None
    for shard in (replace(item.shard, stretches=False), replace(item.shard, cut=1), replace(item.shard, pieces=10**6)):
        assert not can_be(replace(item, shard=shard), _how(how))
    narrow = replace(item, state={name: x.bfloat16() for name, x in item.state.items()})
    assert can_be(narrow, _how(how))  # but for momenta that are read after they were rounded
    assert not can_be(narrow, _how(how | {"strength": replace(NORM, of="momentum")}))
    assert not can_be(narrow, _how(how | {"selection": MOMENTUM}))
    assert can_be(narrow, _how(how | {"selection": PREVIOUS}))
    first = replace(item, state={})  # SGD's first step makes the buffer in the dtype of what is stepped
    assert not can_be(first, _how(how | {"rule": SGDRule(0.1, 0.9)}))


@given(count=st.integers(1, 5), numel=st.integers(0, 300), seed=st.integers(0, 10**6))
def test_counting_in_lanes(count: int, numel: int, seed: int) -> None:
    """What a GPU does instead of `bincount`."""
    generator = torch.Generator().manual_seed(seed)
    digit = torch.randint(-300, 600, (numel,), generator=generator, dtype=torch.int32)
    seg = torch.randint(0, count, (numel,), generator=generator)
    assert torch.equal(counting.in_lanes(digit, seg, count), counting.histograms(digit, seg, count))


class Counting(TorchDispatchMode):
    """How many operations there are that a GPU would have to be sent: all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("statistics", [False, True])
def test_no_number_of_operations_grows_with_the_tensors(statistics: bool) -> None:
    """Besides the kernels' own, for 5 and for 20 tensors; and the twin, the other way."""
    how = {"rule": ADAM, "selection": Selection("top_k"), "strength": FIXED, "statistics": statistics}
    counts = []
    for times, joined in ((1, True), (4, True), (1, False), (4, False)):
        items = ItemList([item for _ in range(times) for item in shards(ADAM, 1, "plain", torch.float32)[0]])
        with pytest.MonkeyPatch.context() as patch, Counting() as counting_mode:
            if not joined:
                patch.setattr(stepping, "can_be", lambda item, how: False)
            run([items], lambda *args, **kwargs: None, **how)
        counts.append(counting_mode.count)
    assert counts[0] == counts[1] <= 400
    assert counts[3] > 3 * counts[2]
