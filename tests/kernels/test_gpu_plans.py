"""Steps by plans that are kept are those by fresh ones, whatever changes between two of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from gpu_support import BF16, F32, assert_equal_items, copied, few_samples, made, rule_on
from step_cases import KINDS, RULES

from selective.kernels import Draw, Item, ItemList, Selection, SGDRule, Strength, selective_step

ADAM = RULES["adamw"]
DTYPES = [(F32, F32, F32), (BF16, BF16, F32)]
SIZES = (400, 7, 300)


def items_of(rule, device: str, seed: int = 1) -> list[Item]:
    return [copied(made(rule, (n,), DTYPES[i % 2], seed=seed, address=i), device) for i, n in enumerate(SIZES)]


def nothing(items: list[Item], number: int) -> None:
    pass


def new_gradients(items: list[Item], number: int) -> None:
    for i, item in enumerate(items):
        generator = torch.Generator().manual_seed(100 * number + i)
        item.grad = torch.randn(item.grad.shape, generator=generator).to(item.grad.device, item.grad.dtype)


def new_state(items: list[Item], number: int) -> None:
    for item in items:
        for key in item.state.keys() - {"step"}:
            item.state[key] = item.state[key] * 0.5


def new_data(items: list[Item], number: int) -> None:
    for item in items:
        item.param.data = item.param.detach() * 0.5


def another_step_count(items: list[Item], number: int) -> None:
    for item in items:
        if "step" in item.state:
            item.state["step"] = item.state["step"] + 10


def odd_addresses(items: list[Item], number: int) -> None:
    for item in items:
        grad = torch.empty(item.grad.numel() + 8, dtype=item.grad.dtype, device=item.grad.device)[1:-7]
        item.grad = grad.copy_(item.grad)


def strided_gradients(items: list[Item], number: int) -> None:
    for item in items:
        item.grad = item.grad.repeat_interleave(2)[::2]


def another_dtype(items: list[Item], number: int) -> None:
    for item in items:
        item.grad = item.grad.to(torch.float16)


def fewer_items(items: list[Item], number: int) -> None:
    if number == 2:
        del items[0]


def other_order(items: list[Item], number: int) -> None:
    items.reverse()


def new_sizes(items: list[Item], number: int) -> None:
    items[1] = copied(items[2])
    items[1].address = 77


def other_addresses(items: list[Item], number: int) -> None:
    for item in items:
        item.address += 10


CHANGES = [
    nothing, new_gradients, new_state, new_data, another_step_count, odd_addresses, strided_gradients, another_dtype,
    fewer_items, other_order, new_sizes, other_addresses,
]  # fmt: skip

MORE = [new_data]  # this one with slow kernels
INTERPRETED = () if torch.cuda.is_available() else pytest.mark.slow  # too slow for the interpreter


def both_ways(rules: Callable, change: Callable, case: tuple, device: str, steps: int = 3, schedule=None) -> None:
    """Steps by an `ItemList`, and by lists that are forgotten, from one start."""
    kept, fresh = ItemList(items_of(rules(0), device)), items_of(rules(0), device)
    for number in range(steps):
        selection, strength = case if schedule is None else schedule(*case, number)
        how = {"rule": rule_on(rules(number), device), "selection": selection, "strength": strength,
               "draw": Draw(3, number), "statistics": True, "backend": "gpu"}  # fmt: skip
        if number:
            change(kept, number)
            change(fresh, number)
        ours = list(selective_step(kept, **how))
        theirs = list(selective_step([*fresh], **how))
        assert ours == theirs, f"step {number}"
        assert_equal_items(kept, fresh, f"step {number}")


@pytest.mark.parametrize(
    "rule, case, change",
    [("adamw", "top_k" if change in MORE else "agreement", change) for change in CHANGES]
    + [pytest.param("lion", "top_k_mean", change, marks=INTERPRETED) for change in (new_gradients, other_order)]
    + [("sgd_nesterov", "element", change) for change in (new_gradients, new_state, fewer_items, other_addresses)],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_kept_plan_steps_as_a_fresh_one(rule, case, change, device, monkeypatch):
    few_samples(monkeypatch)
    both_ways(lambda number: RULES[rule], change, KINDS[case], device)


@pytest.mark.parametrize("case", ["agreement", "previous", "sampled"])
def test_a_kept_plan_of_every_kind(case, device, monkeypatch):
    few_samples(monkeypatch)
    both_ways(lambda number: ADAM, new_gradients, KINDS[case], device)


def scheduled(selection: Selection, strength: Strength, number: int) -> tuple[Selection, Strength]:
    """All that somebody may schedule, through 0 and 1."""
    x = (0.0, 1.0, 0.3, 0.55)[number % 4]
    selection = replace(selection, fraction=x, probability=x)
    return selection, replace(strength, selected=2 * x, rest=1 - x, cap=1 + x, temperature=1 + x, smoothing=x)


def schedule_of(name: str) -> Callable:
    def rules(number: int):
        lr = torch.tensor(0.01 * (number % 3)) if number % 2 else 0.01 * (number % 3)
        changes = {"lr": lr, "maximize": number == 3}
        if name == "lion":
            changes |= {"decay_factor": (0.9, 1.0, 0.8)[number % 3], "beta1": 0.8 + 0.05 * (number % 3)}
        return replace(RULES[name], **changes)

    return rules


@pytest.mark.parametrize(
    "rule, case",
    [
        pytest.param(rule, case, marks=INTERPRETED if (rule, case) == ("sgd_nesterov", "top_k") else ())
        for rule, case in zip(["adamw", "lion", "sgd_nesterov"] * 2, KINDS, strict=True)
    ],
)
def test_hyper_parameters_may_be_scheduled(rule, case, device, monkeypatch):
    few_samples(monkeypatch)
    both_ways(schedule_of(rule), new_gradients, KINDS[case], device, 4, scheduled)


def test_another_rule_selection_strength_or_statistics_is_seen(device, monkeypatch):
    few_samples(monkeypatch)
    kept, fresh = ItemList(items_of(ADAM, device)), items_of(ADAM, device)
    wanted = [*KINDS.values(), (Selection("agreement", strict=False), Strength("fixed", 1.0, -1.0, still=True)),
              (Selection("top_k", score="nesterov"), Strength("norm_preserving", of="gradient"))]  # fmt: skip
    rules = [ADAM, replace(ADAM, decoupled=False), replace(ADAM, maximize=True), replace(ADAM, weight_decay=0.0)]
    for number, (selection, strength) in enumerate(wanted):
        how = {"rule": rules[number % 4], "selection": selection, "strength": strength, "statistics": number % 3 != 0,
               "draw": Draw(0, number, stochastic=number % 2 == 1), "backend": "gpu"}  # fmt: skip
        ours, theirs = selective_step(kept, **how), selective_step([*fresh], **how)
        assert (ours is None) == (theirs is None) == (number % 3 == 0)
        assert ours is None or list(ours) == list(theirs)
        assert_equal_items(kept, fresh, str(number))


def test_refresh_puts_new_numbers_on_the_device(device):
    """For replays of a CUDA graph, whose launches are recorded: they read what `refresh` has written."""
    items = ItemList(items_of(SGDRule(0.1, 0.9), device))
    rule, selection = SGDRule(0.1, 0.9), Selection("bernoulli", probability=0.0)
    selective_step(items, rule=rule, selection=selection, strength=Strength("fixed"), draw=Draw(0, 0), backend="gpu")
    (groups,) = items.cache["plan"].groups.values()
    before = groups.hyper.clone()
    items.cache["upload_hyperparameters"](replace(selection, probability=0.5), Strength("fixed", 3.0, 0.25))
    assert (groups.hyper != before).sum() == 3  # the limit of the coin, and both strengths


def test_a_plan_is_not_kept_for_copies(device):
    """Tensors that have to be copied, and a first step of SGD, are looked at anew in every step."""
    rule, how = SGDRule(0.1, 0.9), {"selection": Selection("top_k"), "strength": Strength("fixed"), "backend": "gpu"}
    items = ItemList([copied(made(rule, (6, 5)), device)])
    selective_step(items, rule=rule, draw=Draw(0, 0), **how)
    assert "plan" not in items.cache  # the momentum has begun
    selective_step(items, rule=rule, draw=Draw(0, 1), **how)
    assert "plan" in items.cache
    items = ItemList([copied(made(rule, (6, 5), seed=1), device)])
    items[0].param = items[0].param.t().contiguous().t()
    selective_step(items, rule=rule, draw=Draw(0, 0), **how)
    assert "plan" not in items.cache


@pytest.mark.parametrize("offset", [0, 1])
def test_a_buffer_may_be_elsewhere_in_every_step(offset, device):
    """As the one that a rotated update is left in: the tables are kept, and follow it, aligned or not."""
    kept, fresh = ItemList(items_of(ADAM, device)), items_of(ADAM, device)
    how = {"rule": ADAM, "selection": Selection("agreement"), "strength": Strength("fixed", 2.0, 0.5), "backend": "gpu"}
    plans = []
    for number in range(3):
        for items in (kept, fresh):
            for item in items:
                room = torch.zeros(item.param.numel() + number * offset, dtype=item.param.dtype, device=device)
                item.param = room[number * offset :].copy_(item.param)
        selective_step(kept, draw=Draw(0, number), **how)
        selective_step([*fresh], draw=Draw(0, number), **how)
        assert_equal_items(kept, fresh, str(number))
        plans.append(kept.cache["plan"])
    assert plans[0] is plans[1] is plans[2]


def test_a_parameter_on_another_device_has_another_plan(device):
    """Whoever hands that in gets what `selective_step` makes of it, and no kernel an address of another device."""
    kept = ItemList(items_of(ADAM, device))
    how = {"rule": ADAM, "selection": Selection("agreement"), "strength": Strength("fixed", 2.0, 0.5)}
    selective_step(kept, draw=Draw(0, 0), backend="gpu", **how)
    batches = kept.cache["plan"].batches
    assert all(batch.fits(kept) for batch in batches)
    for change in (lambda x: x.to("meta"), lambda x: x.clone().as_subclass(type("Other", (torch.Tensor,), {}))):
        others = ItemList([replace(item, param=change(item.param), grad=change(item.grad)) for item in kept])
        assert not any(batch.fits(others) for batch in batches)
