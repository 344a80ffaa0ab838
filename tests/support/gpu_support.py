"""Helpers for tests of the GPU path: steps by it and by the reference from one start, and their tolerances."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from selective.kernels import AdamRule, Draw, GivenRule, Item, LionRule, Rule, SGDRule, Sums, selective_step
from selective.kernels.checked.roundings import ROUNDINGS, SUMS, spacing
from selective.kernels.spec import SUM_NAMES

CUDA = torch.cuda.is_available()
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# (parameter, gradient, state)
DTYPES = {
    "f32": (F32, F32, F32), "bf16": (BF16, BF16, BF16), "f16": (F16, F16, F16), "bf16+f32": (BF16, BF16, F32),
    "f32+bf16": (F32, BF16, F32), "bf16+f32g": (BF16, F32, F32), "f16+f32": (F16, F32, F16),
    "f32+bf16s": (F32, F32, BF16),
}  # fmt: skip


def few_samples(patch: pytest.MonkeyPatch) -> None:
    """Use brackets for tensors of more than 256 elements, so that small ones take every launch that large ones do."""
    from selective.kernels.gpu import configure

    patch.setattr(configure, "FEWEST_SAMPLES", 256)
    patch.setattr(configure, "MOST_SAMPLES", 512)


def missing_brackets(patch: pytest.MonkeyPatch, width: float = -4.0) -> None:
    """Make brackets inside out, so that they hold nothing."""
    from selective.kernels.gpu import launch

    patch.setattr(launch, "WIDTH", width)


def short_lists(patch: pytest.MonkeyPatch, capacity: int = 16) -> None:
    """Make lists of ties overflow early."""
    from selective.kernels.gpu import launch
    from selective.kernels.gpu.device.top_k import settle

    for module in (settle, launch):
        patch.setattr(module, "TINY", capacity, raising=False)


def no_repair(patch: pytest.MonkeyPatch) -> None:
    """Skip the repair of brackets that missed and lists that overflowed, for the failing twins."""
    from selective.kernels.gpu.launch import Step

    patch.setattr(Step, "_repair", lambda self, *arguments, **named: None)


def rule_on(rule: Rule, device: str) -> Any:
    """The rule, with those hyper-parameters that are tensors moved to this device."""
    values = {f.name: getattr(rule, f.name) for f in fields(rule)}
    return replace(rule, **{k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)})


def copied(item: Item, device: torch.device | str | None = None) -> Item:
    """A copy of an item in memory of its own, with the same sharing. Step counters of Adam stay on the host."""
    seen: dict[int, Tensor] = {}

    def copy(x: Tensor) -> Tensor:
        if id(x) not in seen:
            seen[id(x)] = x.detach().clone().to(device or x.device)
        return seen[id(x)]

    state = {k: v.clone() if k == "step" else copy(v) for k, v in item.state.items()}
    kept = {k: copy(v) for k, v in item.policy_state.items()}
    return Item(copy(item.param), copy(item.grad), state, item.address, kept)


def made(rule: Rule, shape: Any, dtypes: Any = (F32, F32, F32), seed: int = 0, address: int = 5) -> Item:
    """An item in mid-training, on the CPU. SGD with an even seed is before its first step."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float, dtype: torch.dtype) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    own, of_grad, of_state = dtypes
    param, grad = normal(1.0, own), normal(0.1, of_grad)
    state: dict[str, Tensor] = {}
    if isinstance(rule, AdamRule):
        state = {"step": torch.tensor(3.0), "exp_avg": normal(0.05, of_state),
                 "exp_avg_sq": normal(0.1, F32).square().to(of_state)}  # fmt: skip
        if rule.amsgrad:
            state["max_exp_avg_sq"] = normal(0.1, F32).square().to(of_state)
    elif isinstance(rule, LionRule) or (isinstance(rule, SGDRule) and rule.momentum and seed % 2):
        state = {"exp_avg" if isinstance(rule, LionRule) else "momentum_buffer": normal(0.05, of_state)}
    elif isinstance(rule, GivenRule):
        state = {"update": normal(0.01, of_state), "start": param.clone(), "momentum": normal(1.0, of_state),
                 "previous_momentum": normal(1.0, of_state)}  # fmt: skip
    for key in state.keys() & {"exp_avg", "momentum_buffer"}:
        _off_the_border(param, grad, state[key])
    return Item(param, grad, state, address)


def _off_the_border(param: Tensor, grad: Tensor, momentum: Tensor) -> None:
    """Halve, in place, momenta that would cancel against the gradient so far that rounding decides the sign.

    With numbers of few digits, that happens.
    """
    p, g = param.double() / 8, grad.double()
    sums = [(0.9, 0.1), (0.99, 0.01), (0.9, 0.7), (0.9, 1.0), (0.81, 1.9)]  # weights of momentum and gradient
    for _ in range(20):
        m = momentum.double()
        near = torch.zeros_like(m, dtype=torch.bool)
        for h in (g, -g, g + p, p - g):
            for old, new in sums:
                near |= (old * m + new * h).abs() < 1e-5 * m.abs()
        if not near.any():
            return
        momentum[near] /= 2
    raise AssertionError("no momentum off the border was found")


def gpu(item: Item, rule: Rule, **how: Any) -> Sums:
    """Step one tensor by the GPU path."""
    how = {"draw": Draw(7, 3), "backend": "gpu", **how}
    (sums,) = selective_step([item], rule=rule_on(rule, str(item.param.device)), statistics=True, **how)
    return sums


def reference(item: Item, rule: Rule, **how: Any) -> tuple[Item, Sums]:
    """Take the same step on a CPU copy, by the reference."""
    twin, how = copied(item, "cpu"), {"draw": Draw(7, 3), **how}
    (sums,) = selective_step([twin], rule=rule_on(rule, "cpu"), statistics=True, backend="reference", **how)
    return twin, sums


def apart(a: Tensor, b: Tensor, size: Tensor) -> Tensor:
    """The distance of two tensors of one dtype, in spacings at `size`; 0 where both are NaN or the same infinity."""
    a, b, size = a.detach().cpu(), b.detach().cpu(), size.detach().cpu()
    assert a.dtype == b.dtype and a.shape == b.shape
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, (a.double() - b.double()).abs() / spacing(size, a.dtype))


def assert_same_sums(got: Sums, wanted: Sums, what: str = "") -> None:
    """Require equal counts, and sums to `SUMS`: pairwise float32 sums of some thousand squares, each a few eps off."""
    size = (float(wanted.update_sq) * float(wanted.grad_sq)) ** 0.5
    assert got.numel == wanted.numel, what
    for name in SUM_NAMES:
        a, b = float(getattr(got, name)), float(getattr(wanted, name))
        bound = 0 if name == "selected" else SUMS * (size if name == "update_grad" else abs(b))
        assert abs(a - b) <= bound or a == b or (a != a and b != b), f"{what} {name}: {a}, wanted {b}"


def bound_of(start: Item, wanted: Item, rule: Rule | None = None) -> Tensor:
    """The largest distance of two parameters that rounding alone can make, in float64.

    One spacing is due to the last two operations, which round alike but have different inputs. The rest is due to the
    update, relative to the terms of its momentum's sum (which may cancel). The reference has six roundings of half an
    eps. The kernels have four, and a root and a division that are off by one and two units at most. Together: 8 eps.
    """
    before, after = start.param.detach().cpu().double(), wanted.param.double()
    first = next((k for k in ("exp_avg", "momentum_buffer") if k in wanted.state), None)
    moved = (after - before).abs()
    if first is not None:
        new = wanted.state[first].double().abs()
        terms = start.grad.cpu().double().abs() + before.abs() / 8  # 1/8: the largest coupled decay
        if first in start.state:
            terms = terms + start.state[first].cpu().double().abs()
        if isinstance(rule, SGDRule) and rule.nesterov:  # one more sum, which may cancel by itself
            new = torch.minimum(new, (start.grad.cpu().double() + rule.momentum * wanted.state[first].double()).abs())
        moved = torch.where(new > 0, moved * (terms / new).clamp(min=1), moved)
    return (
        spacing(torch.maximum(before.abs(), after.abs()), wanted.param.dtype) + ROUNDINGS * torch.finfo(F32).eps * moved
    )


def assert_same_step(start: Item, got: Item, wanted: Item, what: str = "") -> None:
    """Compare parameter, state and average after one step by two implementations.

    State differs by at most one spacing of its dtype, or two in float32: of two products and their sum, each side
    rounds the sum and one of the products, but not the same product. Spacings are those of the largest term.
    """
    a, b = got.param.detach().cpu().double(), wanted.param.double()
    off = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs() / bound_of(start, wanted))
    assert off.numel() == 0 or float(off.max()) <= 1, f"{what} parameter: {float(off.max()):.3g} of the bound"
    assert got.state.keys() == wanted.state.keys(), what
    for key, value in wanted.state.items():
        if got.state[key] is got.param:
            continue
        old = start.state.get(key, start.grad).cpu().float().abs()
        if key == "momentum_buffer":
            old = torch.maximum(old, start.grad.cpu().float().abs())
        off = apart(got.state[key], value, torch.maximum(old, value.float().abs()))
        most = 2.0 if value.dtype == F32 else 1.0
        assert off.numel() == 0 or float(off.max()) <= most, f"{what} {key}: {float(off.max()):.3g} ulp"
    for key, value in wanted.policy_state.items():
        torch.testing.assert_close(got.policy_state[key].cpu(), value, rtol=1e-6, atol=0)


def assert_equal_items(a: list[Item], b: list[Item], what: str = "") -> None:
    """Require the same bits in everything."""
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.param, y.param), what
        for mine, theirs in ((x.state, y.state), (x.policy_state, y.policy_state)):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[k], theirs[k]) for k in mine), what
