"""Whole optimizers whose every step is compared with the reference: all ways in which the kernels are called."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from selective import (
    MGUP,
    AlphaConsistency,
    Cautious,
    CautiousDecay,
    CautiousMGUP,
    ChainedOptimizer,
    Dense,
    Grams,
    Magma,
    Policy,
    RandomMask,
    SelectiveUpdate,
    SkipUpdate,
    Soap,
)
from selective.kernels import KernelDifference, checked_steps, cpu

SHAPES = ((12, 8), (8, 12), (12, 8), (5,))
POLICIES: dict[str, Policy] = {
    "alpha": AlphaConsistency(), "mgup": MGUP(), "mgup-nesterov": MGUP(score="nesterov"), "cautious": Cautious(),
    "cautious-mgup": CautiousMGUP(), "grams": Grams(), "magma": Magma(), "skip": SkipUpdate(), "random": RandomMask(),
    "control-of-cautious": RandomMask.matching(Cautious()), "control-of-mgup": RandomMask.matching(MGUP()),
    "dense": Dense(),
}  # fmt: skip
Params = list[torch.nn.Parameter]
Make = Callable[[Params, Policy], Any]


def adamw(params: Any, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=0.05, weight_decay=0.1, **options)


def muon(params: Params, policy: Policy) -> ChainedOptimizer:
    matrices = [p for p in params if p.ndim == 2]
    rest = [p for p in params if p.ndim != 2]
    first = SelectiveUpdate(torch.optim.Muon(matrices, lr=0.02), policy=policy, capture="fused")
    return ChainedOptimizer({"matrices": first, "rest": SelectiveUpdate(adamw(rest), policy=policy)})


WAYS: dict[str, Make] = {
    "fused": lambda params, policy: SelectiveUpdate(adamw(params), policy=policy),
    "fused, coupled decay": lambda params, policy: SelectiveUpdate(
        torch.optim.Adam(params, lr=0.05, weight_decay=0.1, amsgrad=True, maximize=True), policy=policy
    ),
    "fused, selective decay": lambda params, policy: SelectiveUpdate(
        adamw(params), policy=policy, decay=CautiousDecay()
    ),
    "fused SGD": lambda params, policy: SelectiveUpdate(
        torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True), policy=policy
    ),
    "scratch": lambda params, policy: SelectiveUpdate(adamw(params), policy=policy, capture="scratch"),
    "delta": lambda params, policy: SelectiveUpdate(adamw(params), policy=policy, capture="delta"),
    "rotated": lambda params, policy: SelectiveUpdate(
        adamw(params), policy=policy, preconditioner=Soap(refresh_every=2)
    ),
    "rotated scratch": lambda params, policy: SelectiveUpdate(
        adamw(params), policy=policy, capture="scratch", preconditioner=Soap(refresh_every=2)
    ),
    "Muon": muon,
}


def parameters(dtype: torch.dtype = torch.float32) -> Params:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def step(optimizer: Any, params: Params, number: int) -> None:
    for index, p in enumerate(params):
        generator = torch.Generator().manual_seed(100 * number + index)
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    optimizer.step()


def test_every_policy_of_ours_is_in_the_list() -> None:
    ours = {policy for policy in Policy._registry.values() if policy.__module__.startswith("selective.")}
    assert {policy.__name__ for policy in ours - {type(policy) for policy in POLICIES.values()}} == {"Combined"}


OTHERS = {
    "mgup",
    "control-of-cautious",
}  # with these each way is tried in every run, with all others where there is time
PAIRS = [
    pytest.param(make, policy, id=f"{way}-{name}", marks=[] if way == "fused" or name in OTHERS else pytest.mark.slow)
    for way, make in WAYS.items()
    for name, policy in POLICIES.items()
]


@pytest.mark.parametrize("make, policy", PAIRS)
def test_right_kernels_pass_and_nothing_changes(make: Make, policy: Policy) -> None:
    checked, alone = parameters(), parameters()
    optimizer, twin = make(checked, policy), make(alone, policy)
    for number in range(4):
        with checked_steps(tempfile.gettempdir()):
            step(optimizer, checked, number)
        step(twin, alone, number)
    assert all(torch.equal(a, b) for a, b in zip(checked, alone, strict=True))


@pytest.mark.parametrize("make", WAYS.values(), ids=WAYS)
def test_low_precision_passes(make: Make) -> None:
    params = parameters(torch.bfloat16)
    optimizer = make(params, MGUP())
    with checked_steps(tempfile.gettempdir()):
        for number in range(3):
            step(optimizer, params, number)


@pytest.mark.parametrize("policy", [MGUP(), RandomMask.matching(CautiousMGUP())], ids=repr)
def test_sums_of_many_equal_squares_pass(policy: Policy) -> None:
    """Those of Adam's first step, whose roundings go one way: a dot product is 1e-5 to 5e-4 off."""
    param = torch.nn.Parameter(torch.randn(300_000, generator=torch.Generator().manual_seed(0)))
    param.grad = torch.randn(300_000, generator=torch.Generator().manual_seed(1))
    optimizer = SelectiveUpdate(torch.optim.AdamW([param], lr=1e-3), policy=policy)
    with checked_steps(tempfile.gettempdir()):
        optimizer.step()


@pytest.mark.parametrize("make", WAYS.values(), ids=WAYS)
def test_a_wrong_element_is_found_in_its_step(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The kernels step one element of the third parameter wrongly, from the fourth step on."""
    real = cpu.selective_step

    def wrong(items: Sequence[Any], spec: Any) -> Any:
        sums = real(items, spec)
        for item in items:
            if item.address == 2 and spec.draw.step >= 3:
                item.param.view(-1)[7] += 0.01
        return sums

    monkeypatch.setattr(cpu, "selective_step", wrong)
    params = parameters()
    optimizer = make(params, Cautious())
    with checked_steps(str(tmp_path)):
        for number in range(3):
            step(optimizer, params, number)
        with pytest.raises(KernelDifference) as caught:
            step(optimizer, params, 3)
    error = caught.value
    assert (error.step, error.name, error.place.entry, error.place.index) == (3, "param_groups[0][2]", "param", (0, 7))
    assert str(error).startswith("step 3, parameter 'param_groups[0][2]' (torch.float32, (12, 8), cpu)")
    assert Path(error.path).parent == tmp_path
