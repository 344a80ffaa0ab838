"""Norm control against its formula, for bases, captures, policies, rotations and views of each kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_optimizer
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import SGD, Adafactor, AdamW, Muon, Optimizer

from selective import (
    MGUP,
    Cautious,
    ChainedOptimizer,
    Dense,
    NormControl,
    Policy,
    RandomMask,
    SelectiveUpdate,
    SkipUpdate,
    Soap,
)

LR, SCALE, STEPS = 0.05, 0.7, 5
F64 = torch.float64
SHAPES = ((9, 6), (6, 6), (9, 6), (5,))
Make = Callable[[list[Any]], Optimizer]
BASES: dict[str, tuple[Make, tuple[Any, ...]]] = {
    "adamw": (lambda p: AdamW(p, lr=LR, weight_decay=0.3), ("auto", "scratch")),
    "sgd with coupled decay": (lambda p: SGD(p, lr=LR, momentum=0.9, weight_decay=0.3), ("auto", "scratch")),
    "lion": (lambda p: pytorch_optimizer.Lion(p, lr=LR, weight_decay=0.3), ("auto",)),
    "adafactor, which looks at the parameter": (lambda p: Adafactor(p, lr=LR, weight_decay=0.0), ("auto",)),
}


class HalfByParameter(Policy):
    """A mask in Python that looks at the parameter."""

    reads = frozenset({"param", "update"})

    def mask(self, view: Any) -> Tensor:
        return (view.param * view.update > 0).to(view.dtype)


POLICIES: dict[str, Policy] = {
    "dense": Dense(), "cautious": Cautious(), "mgup": MGUP(), "random": RandomMask(), "by parameter": HalfByParameter(),
}  # fmt: skip
CELLS = [(base, way, policy) for base, (_, ways) in BASES.items() for way in ways for policy in POLICIES]


def parameters(dtype: torch.dtype = F64, shapes: Any = SHAPES) -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=F64).to(dtype)) for s in shapes]


def give_grads(params: list[Any], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=F64).to(p.dtype)


def without_decay(opt: Any) -> Any:
    for group in opt.param_groups:
        group["weight_decay"] = 0.0
    return opt


def turned(w: Tensor, u: Tensor, rate: float) -> Tensor:
    """W' = W - rate ‖W‖ u / ‖u‖, brought to the norm of W: the formula of one matrix."""
    moved = w - rate * w.norm() * u / max(float(u.norm()), 1e-12)
    return moved * (w.norm() / moved.norm())


def follow(
    opt: SelectiveUpdate, twin: SelectiveUpdate, matrices: Callable[[Tensor], list[Tensor]], **close: Any
) -> None:
    """Step `opt`, and a twin without the rule from the same parameters, whose difference is the update.

    The moments depend on the gradients alone, so that the twin's are those of `opt`.
    """
    ours, theirs = opt.param_groups[0]["params"], twin.param_groups[0]["params"]
    for step in range(STEPS):
        rate = opt.param_groups[0]["lr"] = twin.param_groups[0]["lr"] = LR / (1 + step)
        give_grads(ours, step)
        before = [p.detach().clone() for p in ours]
        for p, q in zip(ours, theirs, strict=True):
            q.data.copy_(p)
            q.grad = None if p.grad is None else p.grad.clone()
        opt.step()
        twin.step()
        for p, q, was in zip(ours, theirs, before, strict=True):
            if p.dim() < 2:  # a vector steps and decays as the base does it
                continue
            rows = zip(matrices(p.detach()), matrices(was), matrices(was - q.detach()), strict=True)
            for new, old, update in rows:
                torch.testing.assert_close(new, turned(old, update, rate * SCALE), **close)


@pytest.mark.parametrize(("base", "way", "policy"), CELLS, ids=str)
def test_is_the_formula(base: str, way: Any, policy: str) -> None:
    """In float64. The twin's update is a difference of numbers below 4, so it has an error of 2^-51 at most.

    It is divided by its norm, which is at least 1e-3 here, and multiplied by a rate below 0.05.
    """
    make = BASES[base][0]
    if policy == "by parameter":
        make = lambda p, made=make: without_decay(made(p))  # noqa: E731  # is refused with a decay
    ours = SelectiveUpdate(make(parameters()), POLICIES[policy], norm=NormControl(scale=SCALE), capture=way)
    twin = without_decay(SelectiveUpdate(make(parameters()), POLICIES[policy], capture=way))
    follow(ours, twin, lambda p: [p], rtol=0, atol=1e-12)


@pytest.mark.parametrize("policy", ["dense", "cautious", "by parameter"])
@pytest.mark.parametrize("space", ["rotated", "original"])
def test_is_the_formula_of_what_a_rotation_leads_to(policy: str, space: Any) -> None:
    """In float32, whose roundings, 2^-24 of numbers below 4, count in the difference of the twin."""
    shapes, rotation = ((9, 6), (6, 6)), Soap(refresh_every=2)

    def make(**options: Any) -> SelectiveUpdate:
        base = AdamW(parameters(torch.float32, shapes), lr=LR, weight_decay=0.0 if policy == "by parameter" else 0.3)
        return SelectiveUpdate(base, POLICIES[policy], preconditioner=rotation, mask_space=space, **options)

    follow(make(norm=NormControl(scale=SCALE)), without_decay(make()), lambda p: [p], rtol=0, atol=1e-5)


def test_vectors_step_and_decay_as_without_it() -> None:
    ours, plain = (AdamW(parameters(), lr=LR, weight_decay=0.3) for _ in range(2))
    kept, free = SelectiveUpdate(ours, Cautious(), norm=NormControl()), SelectiveUpdate(plain, Cautious())
    for step in range(3):
        for opt in (kept, free):
            give_grads(opt.param_groups[0]["params"], step)
            opt.step()
    last = [opt.param_groups[0]["params"][-1].detach() for opt in (kept, free)]
    assert torch.equal(*last)


def test_muon_turns_too() -> None:
    def make(**options: Any) -> SelectiveUpdate:
        base = Muon(parameters(torch.float32, ((9, 6), (6, 6))), lr=LR, weight_decay=0.3)
        return SelectiveUpdate(base, Cautious(), **options)

    follow(make(norm=NormControl(scale=SCALE)), without_decay(make()), lambda p: [p], rtol=0, atol=1e-5)


VIEWS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], list[Tensor]]]] = {
    "matrices": ((8, 6), lambda p: [p]),
    "conv": ((8, 3, 2, 2), lambda p: [p]),
    "experts": ((3, 2, 4, 5), lambda p: list(p.reshape(6, 4, 5))),
    "rows:3": ((9, 5), lambda p: list(p.split(3))),
    "rows:2": ((4, 6, 5), lambda p: list(p.reshape(8, 3, 5))),
    "columns:3": ((5, 9), lambda p: list(p.split(3, dim=1))),
    "columns:2": ((4, 5, 6), lambda p: [part for expert in p for part in expert.split(3, dim=1)]),
}


@pytest.mark.parametrize("view", VIEWS)
def test_each_matrix_of_a_view_has_a_norm_of_its_own(view: Any) -> None:
    """Tolerance as for `test_is_the_formula`."""
    shape, matrices = VIEWS[view]

    def make(**options: Any) -> SelectiveUpdate:
        base = AdamW(parameters(F64, (shape, shape)), lr=LR, weight_decay=0.3)
        return SelectiveUpdate(base, Cautious(), matrix_view=view, **options)

    follow(make(norm=NormControl(scale=SCALE)), without_decay(make()), matrices, rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 7),
    count=st.integers(1, 3),
    rate=st.floats(0, 0.9),
    size=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
    dtype=st.sampled_from([torch.float32, F64]),
)
def test_a_step_keeps_the_norm_whatever_the_gradients(
    rows: int, columns: int, count: int, rate: float, size: float, dtype: torch.dtype
) -> None:
    """A few roundings of the dtype: one of each product, of the sum, and of the stored scale."""
    params = parameters(dtype, ((rows, columns),) * count)
    opt = SelectiveUpdate(SGD(params, lr=rate, momentum=0.9), norm=NormControl())
    before = [p.detach().double().norm() for p in params]
    for step in range(3):
        give_grads(params, step)
        for p in params:
            p.grad.mul_(size)
        opt.step()
    after = [p.detach().double().norm() for p in params]
    torch.testing.assert_close(after, before, rtol=64 * torch.finfo(dtype).eps, atol=0)


def test_it_does_not_drift() -> None:
    """Over 400 steps in float32: a bias of one rounding, 6e-8 a step, would make 2.4e-5."""
    params = parameters(torch.float32, ((40, 30), (20, 20)))
    opt = SelectiveUpdate(AdamW(params, lr=0.02), Cautious(), norm=NormControl())
    before = [p.detach().double().norm() for p in params]
    for step in range(400):
        for index, p in enumerate(params):
            p.grad = torch.sin(torch.arange(p.numel(), dtype=torch.float32) * (1 + step + index)).view_as(p)
        opt.step()
    after = [p.detach().double().norm() for p in params]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=0)


def test_a_rate_of_zero_and_a_gradient_of_zero_change_no_bit() -> None:
    params = parameters(torch.float32)
    opt = SelectiveUpdate(AdamW(params, lr=0.0), Cautious(), norm=NormControl())
    before = [p.detach().clone() for p in params]
    give_grads(params, 0)
    opt.step()
    assert all(torch.equal(p, was) for p, was in zip(params, before, strict=True))
    still = SelectiveUpdate(SGD(parameters(torch.float32), lr=1.0), norm=NormControl())
    for p in still.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    still.step()
    assert all(torch.equal(p, was) for p, was in zip(still.param_groups[0]["params"], before, strict=True))


def test_a_tensor_is_a_rate_and_a_negative_one_climbs() -> None:
    ends = []
    for rate in (LR, torch.tensor(LR, dtype=F64), -LR):
        params = parameters()
        opt = SelectiveUpdate(AdamW(params, lr=LR), norm=NormControl())
        opt.param_groups[0]["lr"] = rate
        start = [p.detach().clone() for p in params]
        give_grads(params, 0)
        opt.step()
        ends.append([p.detach() - was for p, was in zip(params, start, strict=True)])
    assert all(torch.equal(a, b) for a, b in zip(ends[0], ends[1], strict=True))
    assert all(float((a * b).sum()) < 0 for a, b in zip(ends[0], ends[2], strict=True))


@pytest.mark.parametrize("size", [1e-25, 1e-15, 1e15, 1e25])
@pytest.mark.parametrize("weights", [1e-15, 1.0, 1e15])
def test_sizes_do_not_count(size: float, weights: float) -> None:
    """Neither those of the update nor those of the weights, as far as float32 has them. Float32 rounding."""
    if weights / size > 1e38:
        pytest.skip("float32 has no factor that is so large, and the matrix stays as it is")
    ends = []
    for scale, own in ((1.0, 1.0), (size, weights)):
        params = parameters(torch.float32, ((12, 10),))
        opt = SelectiveUpdate(SGD(params, lr=LR), norm=NormControl())
        params[0].data.mul_(own)
        give_grads(params, 0)
        params[0].grad.mul_(scale)
        opt.step()
        ends.append(params[0].detach() / own)
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_a_matrix_that_the_mask_leaves_out_is_left_where_it_is() -> None:
    """Also where the update is a difference of parameters, whose rounding would be taken for one."""
    params = parameters(torch.float32, ((20, 20),) * 6)
    base = Adafactor(params, lr=0.02, weight_decay=0.0)
    opt = SelectiveUpdate(base, SkipUpdate(), norm=NormControl(), momentum_beta=0.9, seed=3)
    give_grads(params, 0)
    before = [p.detach().clone() for p in params]
    opt.step()
    shares = [float(one["share"]) for one in opt.statistics().values()]
    turned_by = [float((p.detach() - w).norm() / w.norm()) for p, w in zip(params, before, strict=True)]
    assert {share > 0 for share in shares} == {True, False}
    assert [by > 0.01 for by in turned_by] == [share > 0 for share in shares]
    assert all(by < 1e-7 for by, share in zip(turned_by, shares, strict=True) if share == 0)


@pytest.mark.parametrize("rate", [0.9, 0.995, 0.9999999, 1.0, 1.0000001])
def test_a_turn_through_zero_is_left_out(rate: float) -> None:
    params = [torch.nn.Parameter(torch.tensor([[2.0]]))]
    opt = SelectiveUpdate(SGD(params, lr=rate), norm=NormControl())
    for _ in range(3):
        params[0].grad = torch.tensor([[1.0]])
        opt.step()
    assert abs(params[0].item()) == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("policy", ["dense", "cautious"])
def test_other_layouts_of_memory_step_alike(policy: str) -> None:
    """A convolution in channels last, a transposed matrix, and both in the usual order. The same bits of sums apart."""
    ends = []
    for last in (False, True):
        params = parameters(torch.float32, ((8, 3, 3, 3), (7, 6)))
        if last:
            params[0].data = params[0].data.contiguous(memory_format=torch.channels_last)
            params[1].data = params[1].data.T.contiguous().T
        opt = SelectiveUpdate(AdamW(params, lr=LR), POLICIES[policy], norm=NormControl(), matrix_view="conv")
        for step in range(3):
            give_grads(params, step)
            opt.step()
        assert params[0].is_contiguous(memory_format=torch.channels_last) == last
        ends.append([p.detach().contiguous() for p in params])
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_missing_gradients_leave_matrices_alone() -> None:
    params = parameters()
    opt = SelectiveUpdate(AdamW(params, lr=LR, weight_decay=0.3), Cautious(), norm=NormControl())
    for step, missing in enumerate([0, 1, None]):
        give_grads(params, step)
        if missing is not None:
            params[missing].grad = None
        before = [p.detach().clone() for p in params]
        opt.step()
        same = [torch.equal(p, was) for p, was in zip(params, before, strict=True)]
        assert same == [index == missing for index in range(len(params))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stochastic", [False, True])
def test_16_bits_are_rounded_as_the_step_rounds(dtype: torch.dtype, stochastic: bool) -> None:
    """Against the same step of float32 parameters: within one place of the dtype, stochastically within two.

    The update is rounded once before, relatively, and its norm with it: two places of the turn.
    """
    options: dict[str, Any] = {"policy": Cautious(), "norm": NormControl(), "stochastic_rounding": stochastic}
    low = parameters(dtype, ((40, 30),))
    wide = [torch.nn.Parameter(p.detach().float()) for p in low]
    ours, exact = (SelectiveUpdate(AdamW(params, lr=LR), **options) for params in (low, wide))
    give_grads(low, 0)
    wide[0].grad, before = low[0].grad.float(), wide[0].detach().clone()
    ours.step()
    exact.step()
    turn = (wide[0].detach() - before).abs()
    room = (wide[0].detach().abs() * (2 if stochastic else 1) + 2 * turn) * torch.finfo(dtype).eps
    assert ((low[0].detach().float() - wide[0].detach()).abs() <= room + torch.finfo(dtype).tiny).all()
    nearest = torch.equal(low[0].detach(), wide[0].detach().to(dtype))
    share = (low[0].detach() == wide[0].detach().to(dtype)).double().mean()
    assert not nearest if stochastic else share > 0.9


def test_groups_of_all_kinds_step_together() -> None:
    """A group with its own rule, one without, vectors, a rotated one, and a chain of two optimizers."""
    a, b, c, d, e = parameters(torch.float32, ((6, 5), (6, 5), (5,), (6, 5), (6, 5)))
    groups = [
        {"params": [a]},
        {"params": [b, c], "norm": None},
        {"params": [d], "norm": {"kind": "NormControl", "scale": 2.0}},
    ]
    first = SelectiveUpdate(AdamW(groups, lr=LR), Cautious(), norm="normcontrol", preconditioner=Soap())
    second = SelectiveUpdate(SGD([e], lr=LR, momentum=0.9), norm=NormControl())
    chain = ChainedOptimizer({"first": first, "second": second})
    before = [p.detach().clone() for p in (a, b, c, d, e)]
    for step in range(2):
        give_grads([a, b, c, d, e], step)
        chain.step()
    norms = [
        math.isclose(float(p.detach().norm()), float(w.norm()), rel_tol=1e-6)
        for p, w in zip((a, b, c, d, e), before, strict=True)
    ]
    assert norms == [True, False, False, True, True]
    angle = [float((p.detach() - w).norm() / w.norm()) for p, w in zip((a, d), before[::3], strict=True)]
    assert angle[1] > 1.5 * angle[0]
