"""Facts that only a GPU can show: the host never waits, nothing is compiled twice, steps can be recorded in a graph."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from gpu_support import F32, copied, made
from step_cases import KINDS, RULES

from selective.kernels import AdamRule, Control, Draw, Item, ItemList, Selection, Strength, selective_step, top_k

pytestmark = pytest.mark.gpu

CASES = {
    **KINDS, "row": (Selection("bernoulli", unit="row"), Strength("fixed", 2.0, 0.0)),
    "control": (Selection("agreement", control=Control()), Strength("mean_preserving")),
    "control_of_still": (Selection("agreement", control=Control()), Strength("fixed", 1.0, -1.0, still=True)),
    "control_of_top_k": (Selection("top_k", control=Control()), Strength("fixed", 2.0, 0.5)),
}  # fmt: skip
SIZES = (300_000, 7, 70_000)


def items_of(rule, on_device: bool = True) -> ItemList:
    items = ItemList(copied(made(rule, (n,), seed=1, address=i), "cuda") for i, n in enumerate(SIZES))
    for item in items:
        if on_device and "step" in item.state:
            item.state["step"] = item.state["step"].cuda()
    return items


def new_gradients(items: list[Item], number: int) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(number)
    return [torch.randn(item.grad.shape, generator=generator, device="cuda") for item in items]


def compiled() -> int:
    """The number of compiled variants of our kernels."""
    import triton

    from selective.kernels import gpu

    modules = [module for name, module in sys.modules.items() if name.startswith(gpu.__name__)]
    kernels = {id(f): f for m in modules for f in vars(m).values() if isinstance(f, triton.runtime.JITFunction)}
    return sum(len(cache[0]) for kernel in kernels.values() for cache in kernel.device_caches.values())


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", ["adamw", "lion", "sgd_nesterov", "scratch"])
def test_the_host_does_not_wait(rule, case, on_device):
    """With statistics, and gradients at new addresses; the first step of a list included."""
    rule, (selection, strength) = RULES[rule], CASES[case]
    how = {"rule": rule, "selection": selection, "strength": strength, "statistics": True}
    selective_step(items_of(rule, on_device), draw=Draw(0, 0), **how)  # compiles
    items = items_of(rule, on_device)
    gradients = [new_gradients(items, number) for number in range(3)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, new in enumerate(gradients):
            for item, grad in zip(items, new, strict=True):
                item.grad = grad
            sums = selective_step(items, draw=Draw(0, number), **how)
            assert sums[0].selected.is_cuda
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_ranking_does_not_wait():
    score = torch.randn(300_000, device="cuda")
    wanted = top_k(score, 1000)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        chosen = top_k(score, 1000)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(chosen, wanted)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", ["adamw", "lion", "sgd_nesterov"])
def test_a_schedule_compiles_nothing(rule, case):
    """100 steps in which every number changes, through 0 and 1."""
    rule, (selection, strength) = RULES[rule], CASES[case]
    items = items_of(rule)
    before = 0
    for number in range(100):
        x = number / 99 if number else 0.5
        changes: dict = {"lr": 0.1 * (1 - x)}
        if hasattr(rule, "decay_factor"):
            changes["decay_factor"] = 1 - 0.1 * (1 - x)
        for item, grad in zip(items, new_gradients(items, number), strict=True):
            item.grad = grad
        selective_step(
            items, rule=replace(rule, **changes), draw=Draw(0, number), statistics=True,
            selection=replace(selection, fraction=x, probability=x),
            strength=replace(strength, selected=2 * x, rest=1 - x, cap=1 + x, smoothing=x),
        )  # fmt: skip
        if number == 0:
            before = compiled()
    assert before > 0
    assert compiled() == before


@pytest.mark.parametrize("rule", ["adamw", "lion"])
@pytest.mark.parametrize("case", CASES)
def test_replays_of_a_graph_are_steps(case, rule):
    """The clock is read on the device, and advances between replays; so do the gradients, in place."""
    rule, (selection, strength) = RULES[rule], CASES[case]
    how = {"rule": rule, "selection": selection, "strength": strength, "statistics": True}
    recorded, eager = items_of(rule), items_of(rule)
    clock = torch.tensor([5, 0], device="cuda")
    draw = Draw(123, 45, clock=clock)  # what the host says is not read
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        selective_step(recorded, draw=draw, **how)
    torch.cuda.current_stream().wait_stream(stream)
    clock[1] += 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sums = selective_step(recorded, draw=draw, **how)
    selective_step(eager, draw=Draw(5, 0), **how)
    for number in range(1, 5):
        for item, other, grad in zip(recorded, eager, new_gradients(eager, number), strict=True):
            item.grad.copy_(grad)
            other.grad.copy_(grad)
        graph.replay()
        wanted = selective_step(eager, draw=Draw(5, number), **how)
        torch.cuda.synchronize()
        clock[1] += 1
        assert list(sums) == list(wanted)
        for a, b in zip(recorded, eager, strict=True):
            assert torch.equal(a.param, b.param)
            assert all(torch.equal(a.state[k], b.state[k]) for k in a.state)


def test_replays_read_refreshed_numbers():
    rule = AdamRule(torch.tensor(1e-2, device="cuda"), 0.9, 0.99, 1e-8)
    selection, strength = Selection("top_k", fraction=0.5), Strength("fixed", 1.0, 0.0)
    items = items_of(rule)
    selective_step(items, rule=rule, selection=selection, strength=strength, draw=Draw(0, 0))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sums = selective_step(items, rule=rule, selection=selection, strength=strength, draw=Draw(0, 0),
                              statistics=True)  # fmt: skip
    for fraction in (0.5, 0.25):
        items.cache["upload_hyperparameters"](replace(selection, fraction=fraction), strength)
        graph.replay()
        assert [int(s.selected) for s in sums] == [int(fraction * n) or n for n in SIZES]
    before = items[0].param.clone()
    rule.lr.zero_()  # a number that lives on the device is read there
    graph.replay()
    assert torch.equal(items[0].param, before)


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    rule, how = RULES["adamw"], {"selection": Selection("top_k"), "strength": Strength("fixed", 2.0, 0.5)}
    items = [copied(made(rule, (70_000,), (F32, F32, F32), seed=1, address=3), f"cuda:{i}") for i in (1, 0, 1)]
    found = selective_step(items, rule=rule, draw=Draw(0, 0), statistics=True, **how)
    assert torch.equal(items[0].param.cpu(), items[1].param.cpu())
    assert torch.equal(items[0].param, items[2].param)
    assert [int(s.selected) for s in found] == [35_000] * 3
