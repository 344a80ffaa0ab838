"""The identity anchors everything: a mask of ones, through every capture, is the base's own step."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from base_optimizers import BASES, build, give_grads, make_params

from selective import Dense, Policy, SelectiveUpdate

STEPS = 20


class Ones(Policy):
    """A custom policy, so that it has to go through the capture."""

    def mask(self, view):
        return torch.ones_like(view.update)


class KernelOnes(Policy):
    """The same through the kernels: everything is selected."""

    def parts(self):
        return Dense().parts()


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """A deep copy by way of a file: torchao's states have no clone."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def captures(name: str) -> list[str]:
    way = BASES[name].way
    return {"fused": ["fused", "scratch", "delta"], "scratch": ["scratch", "delta"], "delta": ["delta"]}[way]


CASES = [(name, way) for name in BASES for way in captures(name)]
# Where a fused rule forms products of its own, it is compared with float64: tests/capture/test_muon.py
SAME_ARITHMETIC = [(n, w) for n, w in CASES if not (BASES[n].other_products and w == "fused")]
# torchao's states don't take float64; residue keepers are refused by scratch in low precision
LOW_CASES = [(n, w) for n, w in CASES if BASES[n].double and not (BASES[n].residue and w == "scratch")]


@pytest.fixture(autouse=True)
def _eager():
    """torchao compiles its step; what is tested is not the compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dense_hands_the_step_to_the_base_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    base = BASES[name]
    theirs, ours = make_params(base, dtype), make_params(base, dtype)
    plain, wrapped = build(base, theirs), SelectiveUpdate(build(base, ours), policy=Dense())
    for step in range(STEPS):
        give_grads(theirs, step)
        give_grads(ours, step)
        plain.step()
        wrapped.step()
        for a, b in zip(theirs, ours, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("policy", [Ones(), KernelOnes()], ids=["own-code", "kernel"])
@pytest.mark.parametrize("name,way", SAME_ARITHMETIC)
def test_ones_agree_with_the_base_from_the_same_state(name: str, way: str, policy: Policy) -> None:
    base = BASES[name]
    theirs, ours = make_params(base), make_params(base)
    plain, wrapped = base.make(theirs), SelectiveUpdate(base.make(ours), policy=policy, capture=way)
    for step in range(STEPS):
        before = [p.detach().clone() for p in theirs]
        with torch.no_grad():
            for a, b in zip(theirs, ours, strict=True):
                b.copy_(a)
        wrapped.base.load_state_dict(_copied(plain.state_dict()))
        give_grads(theirs, step)
        give_grads(ours, step)
        plain.step()
        wrapped.step()
        for p, a, b in zip(before, theirs, ours, strict=True):
            # four roundings: ours of the decayed parameter, of the update, of the difference, and the base's own
            size = torch.maximum(p.abs(), (p - a).abs()).clamp(min=torch.finfo(p.dtype).tiny)
            worst = ((a - b).abs() / size).max().item() / torch.finfo(p.dtype).eps
            assert worst <= 4, f"step {step}, shape {tuple(p.shape)}: {worst:.1f} eps from the base's own step"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name,way", LOW_CASES)
def test_low_precision_loses_no_more_than_the_base(name: str, way: str, dtype: torch.dtype) -> None:
    base = BASES[name]
    exact, theirs, ours = (make_params(base, d) for d in (torch.float64, dtype, dtype))
    with torch.no_grad():
        for e, p in zip(exact, theirs, strict=True):
            e.copy_(p)  # the same start, representable in the low precision
    optimizers = [
        build(base, exact),
        build(base, theirs),
        SelectiveUpdate(build(base, ours), policy=Ones(), capture=way),
    ]
    optimizers[0].param_groups[0].update({k: v for k, v in optimizers[1].param_groups[0].items() if k == "eps"})
    for step in range(STEPS):
        for params, optimizer in zip((exact, theirs, ours), optimizers, strict=True):
            give_grads(params, step)
            optimizer.step()

    def error(params: list[torch.nn.Parameter]) -> float:
        return (
            sum(float((p.detach().double() - e.detach()).square().sum()) for p, e in zip(params, exact, strict=True))
            ** 0.5
        )

    # Both round some 400 numbers 20 times: two independent sums of such squares differ by some 5 %.
    assert error(ours) <= 1.1 * error(theirs)
