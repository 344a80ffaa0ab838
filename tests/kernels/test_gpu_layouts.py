"""The GPU path on awkward memory: odd sizes and addresses, strides, neighbours that must not be touched, many items."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from gpu_support import (
    BF16,
    F16,
    F32,
    assert_same_step,
    assert_same_sums,
    copied,
    few_samples,
    gpu,
    made,
    reference,
    rule_on,
)
from step_cases import RULES

from selective.kernels import Draw, GivenRule, Item, Selection, SGDRule, Strength, selective_step

CASES = {
    "agreement": (Selection("agreement"), Strength("fixed", 1.5, 0.5)),
    "previous": (Selection("agreement", product="previous_momentum"), Strength("norm_preserving", of="momentum")),
    "top_k": (Selection("top_k"), Strength("fixed", 2.0, 0.5)),
    "top_momentum": (Selection("top_k", score="momentum", fraction=0.3), Strength("mean_preserving")),
    "row": (Selection("bernoulli", unit="row"), Strength("alignment")),
}
TRIED = {name: RULES[name] for name in ("adamw", "adam_amsgrad_maximize", "sgd_dampening", "lion", "scratch")}


def tried(case: str, device: str) -> dict[str, Any]:
    """The rules of a case. On a CPU, where kernels are interpreted, two of them: all five over all cases."""
    if device != "cpu":
        return TRIED
    turn = list(CASES).index(case)
    return {name: TRIED[name] for name in (list(TRIED) * 2)[turn : turn + 3 : 2]}


def placed(x: torch.Tensor, place: str, device: str, odd: int = 1) -> torch.Tensor:
    """The same numbers in memory of another layout, with NaN around them."""
    x = x.to(device)
    if place == "odd" or (x.dim() < 2 and place != "strided"):  # not a multiple of 16 bytes
        room = torch.full((x.numel() + 64,), torch.nan, dtype=x.dtype, device=device)
        view = room[32 + odd : 32 + odd + x.numel()].view(x.shape)
    elif place == "transposed":
        view = torch.full((x.numel(),), torch.nan, dtype=x.dtype, device=device).view(x.shape[::-1]).permute(
            *reversed(range(x.dim())))  # fmt: skip
    else:
        room = torch.full([2 * n + 2 for n in x.shape], torch.nan, dtype=x.dtype, device=device)
        view = room[tuple(slice(1, 2 * n + 1, 2) for n in x.shape)]
    view.copy_(x)
    return view


def spread(start: Item, places: list[str], device: str) -> Item:
    """An item whose parameter, gradient and state tensors lie in these layouts, in turn."""
    turn = itertools.cycle(places)
    odd = itertools.count(1)
    param, grad = (placed(x, next(turn), device, next(odd)) for x in (start.param, start.grad))
    state = {k: v.clone() if k == "step" else placed(v, next(turn), device, next(odd)) for k, v in start.state.items()}
    return Item(param, grad, state, start.address)


def around(item: Item) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(all of a storage as bytes, which bytes of it are the item's own) of every tensor of it."""
    found = []
    for x in (item.param, item.grad, *(v for k, v in item.state.items() if k != "step")):
        whole = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
        own = torch.zeros(whole.shape, dtype=torch.bool, device=x.device)
        own.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
        found.append((whole, own))
    return found


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)


def assert_steps_alone(start: Item, item: Item, rule, selection, strength, what: str) -> None:
    """The reference's step, in the same memory, and not a bit of what lies around it is different."""
    addresses = [x.data_ptr() for x in (item.param, *item.state.values())]
    before = [bits(whole).clone() for whole, _ in around(item)]
    sums = gpu(item, rule, selection=selection, strength=strength)
    for old, (whole, own) in zip(before, around(item), strict=True):
        assert torch.equal(old[~own], bits(whole)[~own]), f"{what}: something beside it was written"
    assert [x.data_ptr() for x in (item.param, *list(item.state.values())[: len(addresses) - 1])] == addresses
    twin, wanted = reference(start, rule, selection=selection, strength=strength)
    assert_same_step(start, item, twin, what)
    assert_same_sums(sums, wanted, what)
    if not start.grad.isnan().any():
        assert not item.param.isnan().any()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(0,), (), (1,), (63,), (11, 71), (1823,), (3, 0, 5), (1024,)], ids=str)
def test_hostile_shapes_at_odd_addresses(shape, case, device, monkeypatch):
    few_samples(monkeypatch)
    for name, rule in tried(case, device).items():
        start = made(rule, shape, seed=1)
        assert_steps_alone(start, spread(start, ["odd"], device), rule, *CASES[case], name)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_odd_addresses_of_two_bytes(dtype, device, monkeypatch):
    few_samples(monkeypatch)
    for name, rule in TRIED.items():
        start = made(rule, (1823,), (dtype, dtype, dtype), seed=1)
        assert_steps_alone(start, spread(start, ["odd"], device), rule, *CASES["top_k"], name)


PLACES = [
    ["strided"], ["transposed"], ["odd", "strided", "transposed"], ["transposed", "odd"], ["strided", "odd"],
    ["odd", "transposed", "odd"],
]  # fmt: skip


def cases_in_places() -> list:
    """All of them; exact top-K in each, the other cases in every second one, in turns."""
    cells = [(i + j, case, places) for i, case in enumerate(CASES) for j, places in enumerate(PLACES)]
    return [
        pytest.param(case, places, marks=[] if case == "top_k" or turn % 2 else pytest.mark.slow)
        for turn, case, places in cells
    ]


@pytest.mark.parametrize(("case", "places"), cases_in_places())
def test_layouts_write_through(places, case, device, monkeypatch):
    few_samples(monkeypatch)
    for name, rule in tried(case, device).items():
        start = made(rule, (12, 30), seed=1)
        assert_steps_alone(start, spread(start, places, device), rule, *CASES[case], name)


@pytest.mark.parametrize("case", CASES)
def test_channels_last(case, device, monkeypatch):
    few_samples(monkeypatch)
    for name, rule in tried(case, device).items():
        start = made(rule, (6, 5, 4, 3), seed=1)
        for other in (torch.channels_last, torch.contiguous_format):
            item = copied(start, device)
            item.param = item.param.to(memory_format=torch.channels_last)
            item.grad = item.grad.to(memory_format=other)
            item.state = {k: v if k == "step" else v.to(memory_format=torch.channels_last)
                          for k, v in item.state.items()}  # fmt: skip
            assert_steps_alone(start, item, rule, *CASES[case], name)
            assert item.param.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", CASES)
def test_expanded_gradients(case, device, monkeypatch):
    few_samples(monkeypatch)
    for name, rule in tried(case, device).items():
        for grad in (torch.tensor(0.3).expand(24, 30), torch.linspace(-1, 1, 30).expand(24, 30)):
            start = made(rule, (24, 30), seed=1)
            start.grad = grad.clone()
            item = copied(start, device)
            item.grad = grad.to(device).expand(24, 30)
            assert_steps_alone(start, item, rule, *CASES[case], name)


@pytest.mark.parametrize("case", CASES)
def test_many_items_of_mixed_dtypes_equal_each_alone(case, device, monkeypatch):
    """Also where SGD begins with some of them only, and where some lie at odd addresses."""
    few_samples(monkeypatch)
    selection, strength = CASES[case]
    dtypes = [(F32, F32, F32), (BF16, BF16, F32), (F16, F16, F16), (F32, BF16, F32)]
    for name in ("adamw", "sgd_dampening", "scratch"):
        rule = TRIED[name]
        items = [made(rule, (n,), dtypes[n % 4], seed=n, address=n) for n in (300, 5, 0, 63)]
        items = [spread(x, ["odd"], device) if i % 2 else copied(x, device) for i, x in enumerate(items)]
        alone = [copied(x) for x in items]
        how = {"selection": selection, "strength": strength, "draw": Draw(7, 3)}
        rule = rule_on(rule, device)
        together = selective_step(items, rule=rule, statistics=True, backend="gpu", **how)
        assert len(together) == len(items)
        for item, other, sums in zip(items, alone, together, strict=True):
            assert gpu(other, rule, **how) == sums, name
            assert torch.equal(item.param, other.param), name


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_two_devices_and_float64_in_one_call(case):
    """By "auto": each goes its own way, and the sums come back in order."""
    selection, strength = CASES[case]
    rule = SGDRule(0.1, 0.9)
    places = [("cuda", F32), ("cpu", F32), ("cuda", torch.float64), ("cpu", BF16), ("cuda", BF16)]
    starts = [made(rule, (300 + i,), (dtype,) * 3, seed=1, address=i) for i, (_, dtype) in enumerate(places)]
    items = [copied(start, place) for start, (place, _) in zip(starts, places, strict=True)]
    how = {"rule": rule, "selection": selection, "strength": strength, "draw": Draw(7, 3), "statistics": True}
    for start, item, sums in zip(starts, items, selective_step(items, **how), strict=True):
        twin, wanted = reference(start, rule, selection=selection, strength=strength)
        assert sums.selected.device == item.param.device
        assert_same_step(start, item, twin)
        assert_same_sums(sums, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_a_large_matrix(case, device):
    selection, strength = CASES[case]
    start = made(TRIED["lion"], (4096, 4096), seed=1)
    item = copied(start, device)
    sums = gpu(item, TRIED["lion"], selection=selection, strength=strength)
    twin, wanted = reference(start, TRIED["lion"], selection=selection, strength=strength)
    # Of 16 million sums of two numbers, some cancel to what only rounding decides the sign of.
    assert abs(float(sums.selected) - float(wanted.selected)) <= 32
    assert int(((item.param.cpu() - twin.param).abs() > 1e-4).sum()) <= 32


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, numel", [(F32, 2**29 + 1234), (BF16, 2**31 + 1234)], ids=str)
@pytest.mark.parametrize("selection", [Selection("agreement"), Selection("bernoulli"), Selection("top_k")])
def test_beyond_two_to_the_31(dtype, numel, selection, device):
    """Bytes, and elements: the tail is where a 32-bit offset would come out wrong. As many are not ranked."""
    if selection.kind == "top_k":
        numel = min(numel, 2**31 - 1234)
    generator = torch.Generator(device).manual_seed(0)
    rule, strength, tail = GivenRule(), Strength("fixed", 1.0, 0.0), slice(numel - 4096, numel)

    def normal() -> torch.Tensor:
        return torch.empty(numel, dtype=dtype, device=device).normal_(generator=generator)

    start = torch.zeros(numel, dtype=dtype, device=device)
    item = Item(start, normal(), {"update": normal(), "start": start}, 3)
    sums = gpu(item, rule, selection=selection, strength=strength)
    u, g = item.state["update"], item.grad
    if selection.kind == "top_k":
        assert sums.selected == numel // 2
        score, chosen = (u[tail].float() * g[tail].float()), item.param[tail] != 0
        assert float(score[chosen].min()) >= float(score[~chosen & (u[tail] != 0)].max())
        return
    if selection.kind == "agreement":
        chosen = u[tail].float() * g[tail].float() > 0
    else:
        from selective.kernels import uniform_bits

        limit = round(selection.probability * 2**24)
        chosen = uniform_bits(Draw(7, 3), 3, 4096, offset=numel - 4096, device=device) < limit
    assert torch.equal(item.param[tail], torch.where(chosen, -u[tail], 0))
    assert 0.49 * numel < float(sums.selected) < 0.51 * numel
