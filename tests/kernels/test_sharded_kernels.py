"""Shards stepped by kernels, interpreted: what whole tensors become by kernels, with several ranks in this process.

A part of a sharded step is a generator that yields what it adds to a sum and is sent the sum, so that ranks need no
processes: they take turns. `tests/sharded` runs the same over gloo.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import sharded_pieces
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sharded_pieces import SHAPES, values
from torch.utils._python_dispatch import TorchDispatchMode

from selective.kernels import AdamRule, Draw, Item, ItemList, LionRule, Selection, SGDRule, Strength
from selective.kernels.gpu.launch import run as run_kernel
from selective.kernels.gpu.plan import selective_step as whole_step
from selective.kernels.gpu.sharded import plan as shard_plan
from selective.kernels.gpu.sharded import step as by_kernels
from selective.kernels.gpu.sharded import sums as shard_sums
from selective.kernels.reference.selective_step import selective_step as reference_step
from selective.kernels.sharded import exact_sums as sums
from selective.kernels.sharded.gpu_path import has_gpu_kernel, kind_of
from selective.kernels.sharded.selective_step import sharded_step
from selective.kernels.spec import Rule, StepSpec, Sums

ADAM = AdamRule(1e-2, 0.9, 0.99, 1e-8, weight_decay=0.1)
RULES: dict[str, Rule] = {
    "adamw": ADAM,
    "coupled": replace(ADAM, decoupled=False, weight_decay=0.125),
    "maximize": replace(ADAM, maximize=True),
    "amsgrad": replace(ADAM, amsgrad=True),
    "nesterov": SGDRule(0.1, 0.9, nesterov=True),
    "sgd": SGDRule(0.1),
    "lion": LionRule(0.1, 0.9, 0.99, decay_factor=0.99),
}
FIXED, MEAN = Strength("fixed", 2.0, 0.5), Strength("mean_preserving", rest=0.1, cap=3.0)
DRAW = Draw(1, 2)
WHERE = {"device": "cpu"}


@pytest.fixture(autouse=True)
def _where(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU where there is one; interpreted, with spans so short that these shards have several."""
    monkeypatch.setitem(WHERE, "device", device)
    if device == "cpu":
        monkeypatch.setattr(shard_plan, "SPAN", 16)
        monkeypatch.setattr(by_kernels, "BLOCK", 8)
        monkeypatch.setattr(by_kernels, "TABLE_BLOCK", 4)


def shards(rule: Rule, ranks: int, kind: str, dtype: torch.dtype, seed: int = 0, **more: Any) -> list[ItemList]:
    return sharded_pieces.shards(rule, ranks, kind, dtype, seed, **more, device=WHERE["device"])


def run(ranks: list[ItemList], kernels: Any, **how: Any) -> tuple[list[list[Sums]], list[int]]:
    """All ranks' sums, and how much each round sends."""
    parts = [sharded_step(items, _how(how), local_step=reference_step, kernels=lambda item: kernels) for items in ranks]
    assert all(len(part) == 1 for part in parts)
    steps, sent = [part[0] for part in parts], []
    for one in steps:
        one.resume()
    while steps[0].pending_addends is not None:
        questions = [one.pending_addends for one in steps]
        total = torch.stack([q for q in questions if q is not None]).sum(0, dtype=torch.int32)
        sent.append(total.numel())
        for one in steps:
            one.resume(total.clone())
    assert all(one.pending_addends is None for one in steps)
    return [list(one.result or []) for one in steps], sent


def whole(ranks: list[ItemList], **how: Any) -> tuple[ItemList, list[Sums]]:
    """The same tensors in one piece after the same step, by the kernels of whole tensors."""
    items = ItemList()
    for pieces in zip(*ranks, strict=True):
        state = {
            name: x if x.dim() == 0 else torch.cat([piece.state[name] for piece in pieces])
            for name, x in pieces[0].state.items()
        }
        state |= {"step": state["step"].clone()} if "step" in state else {}
        param, grad = (torch.cat([getattr(piece, name) for piece in pieces]) for name in ("param", "grad"))
        items.append(Item(param, grad, state, pieces[0].address))
    return items, list(whole_step(items, _how(how)) or [])


def _how(how: dict[str, Any]) -> StepSpec:
    return StepSpec(draw=DRAW, **how)


def assert_close(ours: list[ItemList], theirs: list[ItemList], rtol: float, atol: float) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(a.param, b.param, rtol=rtol, atol=atol, equal_nan=True)
            for name in a.state:
                torch.testing.assert_close(a.state[name], b.state[name], rtol=rtol, atol=atol, equal_nan=True)


def joined(ranks: list[ItemList]) -> list[ItemList]:
    items = ItemList()
    for pieces in zip(*ranks, strict=True):
        state = {n: torch.cat([p.state[n] for p in pieces]) for n, x in pieces[0].state.items() if x.dim()}
        items.append(Item(torch.cat([p.param for p in pieces]), pieces[0].grad, state, pieces[0].address))
    return [items]


def assert_same_sums(ours: list[list[Sums]], theirs: list[list[Sums]]) -> None:
    """Sums of squares that were added in float32, some tens of numbers at a time; counts exactly."""
    for a, b in zip(ours, theirs, strict=True):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            for name in vars(one):
                x, y = (torch.as_tensor(getattr(s, name), dtype=torch.float64) for s in (one, other))
                rtol = 0 if name in ("numel", "selected") else 64 * 2**-24
                torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * 1e-2, equal_nan=True, msg=name)


TOP_K, LOOSE = Selection("top_k", fraction=0.4), Selection("agreement", strict=False)
PREVIOUS, MOMENTUM = (Selection("agreement", product=x) for x in ("previous_momentum", "momentum"))  # type: ignore[arg-type]
NORM = Strength("norm_preserving", rest=0.2, cap=3.0)
CASES = {
    "top_k": (TOP_K, FIXED), "top_k, mean": (TOP_K, MEAN), "top_k, norm": (TOP_K, NORM),
    "top_k, norm of momentum": (TOP_K, replace(NORM, of="momentum")), "update, mean": (LOOSE, MEAN),
    "update, norm of gradient": (LOOSE, replace(NORM, of="gradient")), "momentum, mean": (MOMENTUM, MEAN),
    "previous": (PREVIOUS, FIXED), "previous, norm of momentum": (PREVIOUS, replace(NORM, of="momentum")),
}  # fmt: skip


KINDS = ("plain", "ties", "zeros", "strange", "first")
CHECKED = [(case, KINDS[place % 5], "adamw") for place, case in enumerate(CASES)]
CHECKED += [("top_k", kind, "adamw") for kind in KINDS[1:]] + [("previous, norm of momentum", "first", "adamw")]
CHECKED += [
    (case, kind, rule)
    for case, kind in (("top_k, norm", "plain"), ("update, mean", "zeros"))
    for rule in RULES if rule != "adamw"
]  # fmt: skip


@pytest.mark.parametrize(
    "case, kind, rule, statistics",
    [  # in turns with statistics and without; the other half is slow, and so are further rules
        pytest.param(
            *checked, statistics,
            marks=[] if statistics == bool(place % 2) and checked[2] in ("adamw", "sgd") else pytest.mark.slow,
        )
        for place, checked in enumerate(CHECKED) for statistics in (False, True)
    ],
)  # fmt: skip
def test_what_whole_tensors_become(case: str, kind: str, rule: str, statistics: bool) -> None:
    """By the kernels, bit for bit, but where a norm is kept: it is added up in other pieces, and may be a rounding off.

    And what one tensor after the other becomes in plain torch, which rounds the update otherwise in its last bit; it
    sends as much.
    """
    selection, strength = CASES[case]
    if rule == "sgd" and (selection.product != "update" or strength.of == "momentum"):
        pytest.skip("it has no momentum")
    how = {"rule": RULES[rule], "selection": selection, "strength": strength, "statistics": statistics}
    exact = strength.kind != "norm_preserving"
    for ranks in (3,):
        ours, twins = (shards(RULES[rule], ranks, kind, torch.float32) for _ in range(2))
        assert all(has_gpu_kernel(item, _how(how)) for item in ours[0])
        once, its = whole(ours, **how)
        (mine, sent), (other, sent_by_it) = run(ours, by_kernels.ShardKernels, **how), run(twins, None, **how)
        assert sent == sent_by_it
        # 8: of a square root and a quotient; the momentum's square, added in float32
        assert_close(joined(ours), [once], *((0, 0) if exact else (8 * 2**-23, 8 * 2**-23)))
        assert_close(ours, twins, 16 * 2**-23, 16 * 2**-23)
        assert_same_sums(mine, other)
        assert all(len(one) == (len(SHAPES) if statistics else 0) for one in mine)
        if statistics:
            assert_same_sums([[replace(one, masked_sq=0) for one in mine[0]]],  # ties' share of it is of the mean
                             [[replace(one, masked_sq=0) for one in its]])  # fmt: skip


@settings(max_examples=2)
@given(
    fraction=st.floats(0.35, 1), ranks=st.integers(1, 3), seed=st.integers(0, 10**6), span=st.sampled_from([8, 64]),
    kind=st.sampled_from(["plain", "ties", "zeros", "strange"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_drawn(fraction: float, ranks: int, seed: int, span: int, kind: str, dtype: torch.dtype) -> None:
    """Several steps by one plan, spans of any size: the bits of whole tensors, also where momenta are rounded."""
    how = {"rule": ADAM, "strength": FIXED, "statistics": False}
    ours = shards(ADAM, ranks, kind, dtype, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_plan, "SPAN", span)
        patch.setattr(by_kernels, "BLOCK", 8)
        plans = set()
        for step in range(3):
            selection = Selection("top_k", fraction=fraction if step < 2 else 1.0)  # a schedule
            once, _ = whole(ours, selection=selection, **how)
            run(ours, by_kernels.ShardKernels, selection=selection, **how)
            assert_close(joined(ours), [once], 0, 0)
            plans |= {id(plan["plan"]) for items in ours for plan in items.cache.values()}
            for rank in ours:
                for a in rank:
                    a.grad = values(tuple(a.grad.shape), seed + 7 * step, kind).to(a.grad)
        assert len(plans) == ranks


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["plain", "ties", "zeros"])
@pytest.mark.parametrize("statistics", [False, True])
def test_large_shards_on_a_gpu(kind: str, statistics: bool) -> None:
    """Many spans, several steps by one plan, and nobody waits for the device."""
    shapes = [(4096, 1023), (3, 5), (30_001,), (1, 9000), (1000, 64)]
    for selection, strength in ((TOP_K, FIXED), (TOP_K, MEAN), (LOOSE, MEAN), (PREVIOUS, FIXED)):
        how = {"rule": ADAM, "selection": selection, "strength": strength, "statistics": statistics}
        ours = shards(ADAM, 3, kind, torch.float32, shapes=shapes)
        for item in (item for items in ours for item in items):
            item.state["step"] = item.state["step"].cuda()
        for step in range(3):
            once, its = whole(ours, **how)
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            try:
                mine, _ = run(ours, by_kernels.ShardKernels, **how)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert_close(joined(ours), [once], 0, 0)
            assert [float(s.selected) for s in mine[0]] == [float(s.selected) for s in its]


def test_replicas_are_counted_once() -> None:
    """Two ranks with the same rows: the second adds nothing, and gets the same."""
    for selection in (TOP_K, LOOSE, PREVIOUS):
        results = []
        for copies in (1, 2):
            ranks = [shards(ADAM, 1, "ties", torch.float32)[0] for _ in range(copies)]
            for items in ranks[1:]:
                for item in items:
                    assert item.shard is not None
                    item.shard = replace(item.shard, counted=False)
            how = {"rule": ADAM, "selection": selection, "strength": MEAN, "statistics": True}
            sums, _ = run(ranks, by_kernels.ShardKernels, **how)
            results.append((ranks[-1], sums[-1]))
        (first, its), (last, theirs) = results
        assert_close([first], [last], 0, 0)
        assert_same_sums([its], [theirs])


def test_shards_that_are_not_contiguous_are_stepped_as_copies() -> None:
    how = {"rule": ADAM, "selection": TOP_K, "strength": FIXED, "statistics": False}
    ours, twins = (shards(ADAM, 2, "plain", torch.float32) for _ in range(2))
    for item in ours[0]:
        if item.param.dim() > 1:
            item.param = item.param.mT.contiguous().mT
    run(ours, by_kernels.ShardKernels, **how)
    run(twins, by_kernels.ShardKernels, **how)
    assert_close(ours, twins, 0, 0)


def test_a_plan_is_made_anew_where_the_state_is_another_one() -> None:
    how = {"rule": ADAM, "selection": TOP_K, "strength": FIXED, "statistics": False}
    ours, twins = (shards(ADAM, 2, "plain", torch.float32) for _ in range(2))
    for step in range(3):
        for item in (item for items in ours for item in items):
            if step == 1:
                item.state = {name: x.clone() for name, x in item.state.items()}
            if step == 2:
                item.param = item.param.clone()
        for items in twins:
            items.cache.clear()
        run(ours, by_kernels.ShardKernels, **how)
        run(twins, by_kernels.ShardKernels, **how)
        assert_close(ours, twins, 0, 0)


def test_tensors_that_part_leave_no_plans_behind() -> None:
    """One after the other is selected as a whole, by a schedule of the fraction."""
    items = shards(ADAM, 1, "plain", torch.float32)[0]
    for fraction in (0.9, 0.2, 0.05, 0.03):
        one = sharded_step(
            items, StepSpec(ADAM, Selection("top_k", fraction=fraction), FIXED, DRAW), local_step=reference_step,
            kernels=lambda item: by_kernels.ShardKernels,
        )  # fmt: skip
        for part in one:
            part.resume()
            while part.pending_addends is not None:
                part.resume(part.pending_addends.clone())
        assert len([key for key in items.cache if key[0] == "shards"]) == 1


@pytest.mark.parametrize("kernels", [True, False])
def test_a_mask_of_zeros_leaves_a_norm_of_zero(kernels: bool) -> None:
    """The sum of the rest is a difference of sums, which rounding must not take below zero."""
    ours = shards(ADAM, 2, "zeros", torch.float32)
    for item in (item for items in ours for item in items):
        item.state["exp_avg"] *= item.grad != 0
    strength = Strength("fixed", selected=0.0, rest=1.0)
    how = {"rule": ADAM, "selection": Selection("top_k", fraction=1.0), "strength": strength, "statistics": True}
    sums, _ = run(ours, by_kernels.ShardKernels if kernels else None, **how)
    assert all(0 <= float(one.masked_sq) <= 1e-6 * float(one.update_sq) for one in sums[0])


def test_the_first_step_of_sgd_makes_its_momentum() -> None:
    rule = SGDRule(0.1, 0.9)
    ours, twins = (shards(rule, 3, "plain", torch.float32) for _ in range(2))
    for item in (item for items in (*ours, *twins) for item in items):
        item.state.clear()
    how = {"rule": rule, "selection": TOP_K, "strength": MEAN, "statistics": False}
    for _ in range(2):
        run(ours, by_kernels.ShardKernels, **how)
        run(twins, None, **how)
        assert_close(ours, twins, 4 * 2**-23, 4 * 2**-23)


@pytest.mark.parametrize(
    "change",
    [
        {"selection": Selection("top_k", quantile="sampled")},
        {"selection": Selection("top_k", fraction=0.01)},
        {"selection": Selection("bernoulli")},
        {"strength": Strength("alignment")},
        {"strength": replace(MEAN, estimate="sampled")},
        {"strength": replace(FIXED, still=True)},
        {"draw": Draw(1, 2, stochastic=True)},
    ],
)
def test_what_is_left_to_the_other_way(change: dict[str, Any]) -> None:
    how = {"rule": ADAM, "selection": TOP_K, "strength": MEAN, "statistics": False, "draw": DRAW}
    item = shards(ADAM, 2, "plain", torch.float32)[0][0]
    assert has_gpu_kernel(item, StepSpec(**how))
    assert not has_gpu_kernel(item, StepSpec(**how | change))
    assert item.shard is not None
    for shard in (replace(item.shard, stretches=False), replace(item.shard, cut=1), replace(item.shard, pieces=10**6)):
        assert not has_gpu_kernel(replace(item, shard=shard), StepSpec(**how))
        loose = StepSpec(**how | {"selection": LOOSE})  # no order is asked for
        assert has_gpu_kernel(replace(item, shard=shard), loose)


def test_what_one_kernel_can_step_together() -> None:
    how = StepSpec(ADAM, TOP_K, MEAN, DRAW)
    item = shards(ADAM, 2, "plain", torch.float32)[0][0]
    narrow = replace(item, state={name: x.bfloat16() for name, x in item.state.items()})
    others = [narrow, replace(item, grad=item.grad.bfloat16()), replace(item, param=item.param.half())]
    assert len({kind_of(one, how) for one in (item, *others)}) == 4
    noted: dict[str, Any] = {**item.state, "note": "by somebody", "debug": torch.zeros(3), "average": torch.zeros(1)}
    assert kind_of(replace(item, state=noted), how) == kind_of(item, how)  # on this rank alone, perhaps
    sgd = replace(how, rule=SGDRule(0.1, 0.9))
    first, later = replace(item, state={}), replace(item, state={"momentum_buffer": item.param})
    assert kind_of(first, sgd) == kind_of(replace(item, state={"momentum_buffer": None}), sgd) != kind_of(later, sgd)  # type: ignore[arg-type]


@given(st.lists(st.floats(width=64), min_size=1, max_size=40), st.integers(1, 3))
def test_numbers_as_digits(values: list[float], wanted: int) -> None:
    """The bits of `sharded.sums`; and back to rounding, of sums of three processes."""
    device = WHERE["device"]
    x = torch.tensor(values, dtype=torch.float64, device=device)
    totals = torch.full((len(values), shard_sums.TOTALS.value), torch.nan, dtype=torch.float64, device=device)
    columns = torch.arange(wanted, device=device) * 3
    totals[:, columns] = x[:, None].expand(-1, wanted)
    count = len(values) * wanted
    digits = torch.full((count, sums.WIDTH), -7, dtype=torch.int32, device=device)
    how = {"BLOCK": 8, "SLOTS": 64}
    run_kernel(shard_sums.digits_kernel, -(-count // 8), digits, totals, columns, wanted, 9, count, **how)
    expected = sums.digits(x)[:, None].expand(-1, wanted, -1).reshape(count, -1)
    assert torch.equal(digits, expected)
    out, three = torch.empty(count, dtype=torch.float64, device=device), (3 * digits).contiguous()
    run_kernel(shard_sums.numbers_of_kernel, -(-count // 8), out, three, count, **how)
    torch.testing.assert_close(out, sums.number(three), rtol=2**-50, atol=0, equal_nan=True)


class Counting(TorchDispatchMode):
    """The number of operations that a GPU would have to be sent: all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("statistics", [False, True])
def test_no_number_of_operations_grows_with_the_tensors(statistics: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of torch's and of ours, for 5 and for 20 tensors; and the twin, the other way."""
    how = {"rule": RULES["lion"], "selection": TOP_K, "strength": FIXED, "statistics": statistics}
    counts = []
    with monkeypatch.context() as patch:
        for place in (by_kernels, shard_sums, __import__("selective.kernels.gpu.launch", fromlist=["run"])):
            patch.setattr(place, "run", lambda *args, **constants: torch.zeros(()))  # one operation each
        for times in (1, 4):
            items = ItemList(
                [item for _ in range(times) for item in shards(RULES["lion"], 1, "plain", torch.float32)[0]]
            )
            run([items], by_kernels.ShardKernels, **how)
            with Counting() as counting:
                run([items], by_kernels.ShardKernels, **how)  # by the plan of the first
            counts.append(counting.count)
    assert counts[0] == counts[1] <= (60 if statistics else 40)
    for times in (1, 4):
        items = ItemList([item for _ in range(times) for item in shards(RULES["lion"], 1, "plain", torch.float32)[0]])
        with Counting() as counting:
            run([items], None, **how)
        counts.append(counting.count)
    assert counts[3] > 3 * counts[2] > 3 * counts[0]
