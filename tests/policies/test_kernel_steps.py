"""Steps of a selection with a kernel of its own: where that runs, and that it does what its torch twin does."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import numpy
import pytest
import pytorch_optimizer
import torch
from kernel_selections import DEVICE, AlongTheMomentum, FarUpdates, in_kernels
from torch import Tensor

from selective import (
    Alignment,
    Fixed,
    MeanPreserving,
    NormPreserving,
    Policy,
    RandomMask,
    Selection,
    SelectiveUpdate,
    Strength,
    TopK,
    policy_from,
)
from selective.kernels import use_backend

SHAPES = [(40, 50), (7,), (), (3, 1, 5), (0, 4)]


BASES = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, nesterov=True),
    "sgd-without-momentum": lambda params: torch.optim.SGD(params, lr=2e-3),
    "lion": lambda params: pytorch_optimizer.Lion(params, lr=2e-3, weight_decay=0.1),
}


def make(
    policy: Policy, base: str = "adamw", dtype: torch.dtype = torch.float32, device: str = DEVICE, **options: Any
) -> SelectiveUpdate:
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype)) for s in SHAPES
    ]
    return SelectiveUpdate(BASES[base](params), policy=policy, **options)


def parameters(optimizer: SelectiveUpdate) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def step(optimizer: SelectiveUpdate, number: int) -> None:
    generator = torch.Generator().manual_seed(number + 1)
    for p in parameters(optimizer):
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
    optimizer.step()


def calls_of(monkeypatch: pytest.MonkeyPatch, selection: type[Selection]) -> list[int]:
    """Grows with each call of `select`."""
    calls: list[int] = []
    select = selection.select
    monkeypatch.setattr(selection, "select", lambda self, view: calls.append(1) or select(self, view))
    return calls


STRENGTHS = [Fixed(selected=2, rest=0.5), MeanPreserving(rest=0.25), NormPreserving(cap=3), Alignment(rest=0.5)]


SELECTIONS = [FarUpdates(), AlongTheMomentum(), AlongTheMomentum(either=True)]
TOGETHER = [
    *itertools.product(BASES, SELECTIONS, STRENGTHS[1:2], ["auto"]),
    *itertools.product(["adamw"], SELECTIONS[1:2], [STRENGTHS[0], *STRENGTHS[2:]], ["auto"]),
    *itertools.product(["adamw"], SELECTIONS[1:2], STRENGTHS, ["scratch", "delta"]),
    *itertools.product(["sgd", "sgd-without-momentum"], SELECTIONS[:1], STRENGTHS[:1], ["scratch", "delta"]),
]


@pytest.mark.parametrize(("base", "selection", "strength", "capture"), TOGETHER, ids=str)
def test_the_kernel_steps_as_its_twin(
    base: str, selection: Selection, strength: Strength, capture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(selection=selection, strength=strength)
    if base == "sgd-without-momentum" and "momentum" in policy.needs():
        with pytest.raises(ValueError, match="needs the base's momentum"):
            make(policy, base)
        return
    calls = calls_of(monkeypatch, type(selection))
    inlined, twin = make(policy, base, capture=capture), make(policy, base, device="cpu", capture=capture)
    for number in range(3):
        before = len(calls)
        with in_kernels():
            step(inlined, number)
        assert len(calls) == before
        step(twin, number)
        assert len(calls) == before + 4  # not on the empty tensor
        for ours, theirs in zip(parameters(inlined), parameters(twin), strict=True):
            # Numbers of size 1 to 4 in float32: a dozen roundings a step, of the result and of updates below 0.1
            torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=2e-6)
    ours, theirs = inlined.statistics(), twin.statistics()
    for name, said in theirs.items():  # a twin's share is read off its mask, which may have one value only
        torch.testing.assert_close(ours[name]["norm_after"].cpu(), said["norm_after"], rtol=1e-5, atol=1e-9)
    share = theirs["param_groups[0][0]"]["share"]
    torch.testing.assert_close(ours["param_groups[0][0]"]["share"].cpu(), share)
    assert 0 < float(share) < 1 or (base == "lion" and isinstance(selection, FarUpdates))  # whose updates are ± lr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    policy = Policy(selection=FarUpdates(), strength=MeanPreserving())
    inlined, twin = make(policy, dtype=dtype), make(policy, dtype=dtype, device="cpu")
    for number in range(3):
        with in_kernels():
            step(inlined, number)
        step(twin, number)
    for ours, theirs in zip(parameters(inlined), parameters(twin), strict=True):
        # float32 until the one rounding: a neighbour at most, where the exact result is half-way between two
        torch.testing.assert_close(ours.cpu(), theirs, rtol=torch.finfo(dtype).eps, atol=0)


def test_float64_runs_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of(monkeypatch, FarUpdates)
    policy = Policy(selection=FarUpdates(), strength=Fixed())
    optimizer, twin = make(policy, dtype=torch.float64), make(policy, dtype=torch.float64, device="cpu")
    with in_kernels():
        assert "because the parameter is float64" in optimizer.explain()
        step(optimizer, 0)
    assert len(calls) == 4
    step(twin, 0)
    for ours, theirs in zip(parameters(optimizer), parameters(twin), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=1e-13)


def test_where_it_runs_is_asked_again_when_parameters_or_backend_change(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of(monkeypatch, FarUpdates)
    optimizer = make(Policy(selection=FarUpdates(), strength=Fixed()))
    made = []
    for number, (backend, dtype) in enumerate(
        [("gpu", None), ("reference", None), ("gpu", None), ("gpu", torch.float64), ("gpu", torch.float32)]
    ):
        if dtype is not None:
            for p in parameters(optimizer):
                p.data, p.grad = p.data.to(dtype), None
                optimizer.base.state[p].update(
                    {k: v.to(dtype) for k, v in optimizer.base.state[p].items() if k != "step"}
                )
        before = len(calls)
        with use_backend(backend), numpy.errstate(all="ignore"):  # type: ignore[arg-type]
            step(optimizer, number)
        made.append(len(calls) - before)
    assert made == [0, 4, 0, 4, 0]


def test_numbers_are_scheduled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduled number is used from the next step on, by the tables that are there, in the same function."""
    from selective.capture import kernel_calls

    given: list[Any] = []
    run = kernel_calls.selective_steps
    monkeypatch.setattr(
        kernel_calls, "selective_steps", lambda calls: given.extend(call.items for call in calls) or run(calls)
    )
    optimizer = make(Policy(selection=FarUpdates(), strength=Fixed()))
    shares = []
    for number, threshold in enumerate([1e-6, 1e-6, 1e6, 1e-6]):
        optimizer.policy_groups[0]["selection.threshold"] = threshold
        with in_kernels():
            step(optimizer, number)
        shares.append(float(optimizer.statistics()["param_groups[0][0]"]["share"]))
    assert min(shares[0], shares[1], shares[3]) > 0.9
    assert shares[2] == 0
    assert len({id(items) for items in given}) == len({id(items.cache["plan"]) for items in given}) == 1


def test_one_triton_function_for_each_function() -> None:
    from selective.kernels.gpu import jitted

    kernel = FarUpdates().kernel
    assert jitted(kernel) is jitted(FarUpdates(threshold=3).kernel)
    assert jitted(jitted(kernel)) is jitted(kernel)


def test_it_has_a_matched_control() -> None:
    policy = Policy(selection=FarUpdates(), strength=Fixed(selected=2, rest=0.5))
    optimizer, control = make(policy), make(RandomMask.matching(policy))
    with in_kernels():
        step(optimizer, 0)
    step(control, 0)
    theirs = optimizer.statistics()
    for name, said in control.statistics().items():
        torch.testing.assert_close(said["norm_after"], theirs[name]["norm_after"], rtol=1e-5, atol=0)


def test_nothing_of_it_is_saved() -> None:
    policy = Policy(selection=FarUpdates(threshold=0.002), strength=Fixed())
    assert policy.model_dump() == {
        "kind": "Policy", "selection": {"kind": "FarUpdates", "threshold": 0.002},
        "strength": {"kind": "Fixed", "selected": 1.0, "rest": 0.0, "still": False},
    }  # fmt: skip
    for twin in (policy_from(policy.model_dump_json()), copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert twin == policy


def test_a_run_is_resumed() -> None:
    """Saved in the middle, loaded by an optimizer that has another policy: the same bits."""
    policy = Policy(selection=AlongTheMomentum(times=2.5), strength=Alignment())
    straight = make(policy)
    with in_kernels():
        for number in range(4):
            if number == 2:
                buffer = io.BytesIO()
                torch.save([straight.state_dict(), [p.detach() for p in parameters(straight)]], buffer)
            step(straight, number)
        buffer.seek(0)
        state, values = torch.load(buffer, weights_only=True)
        resumed = make(policy)
        resumed.load_state_dict(state)
        assert resumed.policy_groups[0].policy == policy
        with torch.no_grad():
            for p, value in zip(parameters(resumed), values, strict=True):
                p.copy_(value)
        for number in (2, 3):
            step(resumed, number)
    assert all(torch.equal(a, b) for a, b in zip(parameters(straight), parameters(resumed), strict=True))


def test_explain_says_which_of_the_two_runs() -> None:
    optimizer = make(Policy(selection=FarUpdates(), strength=Fixed()), device="cpu")
    said = optimizer.explain()
    assert "  selection its select() runs, the torch twin of its kernel, because the parameter is on the CPU" in said
    assert "one copy of the group's parameters during the step, because the policy is your own code" in said
    assert "  kernels  " not in said
    with use_backend("gpu"):
        optimizer = make(Policy(selection=FarUpdates(), strength=Fixed()))
        assert "  selection its kernel, a Triton function, is inlined into the step\n  kernels   Triton" in (
            optimizer.explain()
        )
        assert "kernels   Triton" in make(Policy(selection=TopK(), strength=Fixed())).explain()
        mixed = make(Policy(selection=TopK(), strength=Fixed()), dtype=torch.float64)
        assert "kernels   reference (plain torch), because the parameter is float64" in mixed.explain()


@pytest.mark.gpu
def test_a_scheduled_number_compiles_nothing() -> None:
    from selective.kernels.gpu.device.selective_step import selective_step_kernel

    def compiled() -> int:
        return sum(len(caches[0]) for caches in selective_step_kernel.device_caches.values())

    optimizer = make(Policy(selection=FarUpdates(), strength=Fixed()))
    step(optimizer, 0)
    before = compiled()
    for number, threshold in enumerate([0.5, 1.0, 2.0, 1e-5]):
        optimizer.policy_groups[0]["selection.threshold"] = threshold
        step(optimizer, number)
    assert before > 0
    assert compiled() == before


@pytest.mark.gpu
def test_it_runs_on_a_gpu_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `use_backend`; CPU and GPU groups side by side."""
    calls = calls_of(monkeypatch, FarUpdates)
    params = [torch.nn.Parameter(torch.ones(300, device=device)) for device in ("cuda", "cpu")]
    base = torch.optim.AdamW([{"params": [p]} for p in params], lr=1e-2)
    optimizer = SelectiveUpdate(base, policy=Policy(selection=FarUpdates(), strength=Fixed()))
    said = optimizer.explain()
    assert said.count("  kernels   Triton") == said.count("inlined") == said.count("on the CPU") == 1
    gradient = torch.randn(300, generator=torch.Generator().manual_seed(1))
    for p in params:
        p.grad = gradient.to(p.device)
    optimizer.step()
    assert len(calls) == 1
    torch.testing.assert_close(params[0].detach().cpu(), params[1].detach())
