"""Several calls (parameter groups) that Triton kernels step together are stepped as each of them alone, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_support import BF16, F32, assert_equal_items, copied, few_samples, made, rule_on
from step_cases import KINDS, RULES

from selective import SelectiveUpdate
from selective.kernels import Draw, Item, ItemList, Selection, Strength, selective_step, selective_steps, use_backend
from selective.kernels.gpu import batch as batches
from selective.kernels.gpu import configure, launch
from selective.kernels.gpu.groups import GroupTable
from selective.kernels.spec import StepCall, StepSpec

ADAM = RULES["adamw"]
SIZES = ((400, 7), (300,), (5, 260))


def lists_of(rule: Any, device: str, sizes: Sequence[Sequence[int]] = SIZES, dtype: Any = F32) -> list[ItemList]:
    """A list of items for each group; addresses count on over all of them."""
    lists, address = [], 0
    for group in sizes:
        items = ItemList()
        for numel in group:
            own = made(rule, (numel,), (dtype, dtype, F32), seed=2 * address + 1, address=address)
            items.append(copied(own, device))
            address += 1
        lists.append(items)
    return lists


def specs_of(rule: Any, selection: Selection, strength: Strength, step: int, device: str) -> list[StepSpec]:
    """Three specs that differ in numbers only."""
    specs = []
    for group in range(3):
        decay = 0.0 if group == 1 else 0.02 * group + 0.01
        changes: Any = {"lr": 0.01 * (group + step + 1)}
        if rule is ADAM:
            changes |= {"weight_decay": decay, "beta1": 0.9 - 0.1 * group}
        chosen = replace(selection, fraction=0.3 + 0.2 * group, probability=0.2 + 0.3 * group)
        strong = replace(
            strength, selected=2.0 + group, rest=0.5 - 0.2 * group, cap=1.5 + group, temperature=1.0 + group
        )
        specs.append(StepSpec(rule_on(replace(rule, **changes), device), chosen, strong, Draw(3 + group, step), True))
    return specs


def run_together(lists: Sequence[list[Item]], specs: Sequence[StepSpec]) -> list[Any]:
    calls = [StepCall(items, spec) for items, spec in zip(lists, specs, strict=True)]
    return [None if sums is None else list(sums) for sums in selective_steps(calls, backend="gpu")]


def run_apart(lists: Sequence[list[Item]], specs: Sequence[StepSpec]) -> list[Any]:
    reports = [selective_step([*items], backend="gpu", **vars(spec)) for items, spec in zip(lists, specs, strict=True)]
    return [None if sums is None else list(sums) for sums in reports]


def both(rule: Any, case: tuple[Selection, Strength], device: str, steps: int = 2, dtype: Any = F32) -> list[ItemList]:
    """Step three groups together, and copies of them apart. Returns the lists that were stepped together."""
    together, apart = lists_of(rule, device, dtype=dtype), lists_of(rule, device, dtype=dtype)
    for step in range(steps):
        specs = specs_of(rule, *case, step, device)
        assert run_together(together, specs) == run_apart(apart, specs), f"step {step}"
        for ours, theirs in zip(together, apart, strict=True):
            assert_equal_items(ours, theirs, f"step {step}")
    return together


@pytest.mark.parametrize(
    ("rule", "case"),
    [
        ("adamw", "agreement"),
        ("adamw", "top_k"),
        *(pytest.param("adamw", case, marks=pytest.mark.slow) for case in KINDS if case not in ("agreement", "top_k")),
        *(pytest.param(rule, "top_k_mean", marks=pytest.mark.slow) for rule in ("lion", "sgd_nesterov")),
    ],
)
def test_groups_with_numbers_of_their_own_share_a_batch(rule: str, case: str, device: str, monkeypatch) -> None:
    few_samples(monkeypatch)
    lists = both(RULES[rule], KINDS[case], device)
    plans = [items.cache["plan"] for items in lists]
    assert plans[0] is plans[1] is plans[2]
    assert len(plans[0].batches) == 1


@pytest.mark.slow
def test_alignment_and_low_precision_share_a_batch(device: str) -> None:
    (plan, *_) = [items.cache["plan"] for items in both(ADAM, (Selection("agreement"), Strength("alignment")), device)]
    assert len(plan.batches) == 1
    (plan, *_) = [items.cache["plan"] for items in both(ADAM, KINDS["agreement"], device, dtype=BF16)]
    assert len(plan.batches) == 1


def test_the_comparison_notices_another_groups_numbers(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = batches.Batch._facts

    def of_the_first_group(self: Any, items: Any) -> Any:
        table = facts(self, items)
        table[:, batches.config.GROUP.value] = 0  # type: ignore[attr-defined]
        return table

    monkeypatch.setattr(batches.Batch, "_facts", of_the_first_group)
    with pytest.raises(AssertionError):
        both(ADAM, KINDS["agreement"], device, 1)


def count_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    real = launch.run

    def counted(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        if programs > 0:
            names.append(kernel.fn.__name__)
        real(kernel, programs, *arguments, **constants)

    monkeypatch.setattr(launch, "run", counted)
    return names


@pytest.mark.parametrize("statistics", [True, False])
def test_a_group_of_another_kind_has_launches_of_its_own(statistics: bool, device: str, monkeypatch) -> None:
    names = count_launches(monkeypatch)
    together, apart = lists_of(ADAM, device), lists_of(ADAM, device)
    specs = specs_of(ADAM, *KINDS["agreement"], 0, device)
    specs[1] = replace(specs[1], selection=Selection("everything"), statistics=statistics)
    ours = run_together(together, specs)
    assert names.count("selective_step_kernel") == 2
    assert ours == run_apart(apart, specs)  # the sums are in the order of the groups again
    assert (ours[1] is not None) == statistics
    for a, b in zip(together, apart, strict=True):
        assert_equal_items(a, b)


def test_a_group_drops_out_and_comes_back_to_its_plan(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    together, apart = lists_of(ADAM, device), lists_of(ADAM, device)
    made_plans: list[int] = []
    init = batches.Batch.__init__
    monkeypatch.setattr(batches.Batch, "__init__", lambda self, *a, **k: made_plans.append(1) or init(self, *a, **k))
    for step, there in enumerate([[0, 1, 2], [0, 2], [0, 1, 2], [0, 2]]):
        specs = specs_of(ADAM, *KINDS["agreement"], step, device)
        ours, theirs = ([[lists[i] for i in there], [specs[i] for i in there]] for lists in (together, apart))
        made_plans_before = len(made_plans)
        assert run_together(*ours) is not None
        made_here = len(made_plans) - made_plans_before
        assert made_here == (1 if step < 2 else 0)
        run_apart(*theirs)
    for a, b in zip(together, apart, strict=True):
        assert_equal_items(a, b)


def test_a_list_that_is_new_leaves_the_others_their_plan(device: str) -> None:
    """So that nothing but its own tables is made anew, if a group's list changes in every step."""
    lists, plans = lists_of(ADAM, device), []
    specs = specs_of(ADAM, *KINDS["agreement"], 0, device)
    for step in range(5):
        if step in (1, 2):
            lists[2] = ItemList(lists[2])
        run_together(lists, specs)
        plans.append([items.cache["plan"] for items in lists])
    assert all(a is b for a, b, _ in plans)
    assert [a is c for a, _, c in plans] == [True, False, False, True, True]  # from its second step on it is with them
    assert plans[1][0] is plans[2][0] and plans[3][0] is plans[4][0]


def test_a_transposed_gradient_leaves_the_others_their_plan(device: str) -> None:
    """It is copied in each step, and the copy is elsewhere each time: the others must not go with it."""
    lists, plans = lists_of(ADAM, device), []
    specs = specs_of(ADAM, *KINDS["agreement"], 0, device)
    grad = lists[1][0].grad
    lists[1][0].grad = torch.stack([grad.flatten(), grad.flatten()], 1)[:, 0].view(grad.shape)
    assert not lists[1][0].grad.is_contiguous()
    for _ in range(3):
        run_together(lists, specs)
        plans.append([items.cache.get("plan") for items in lists])
    assert plans[1][0] is not None
    assert plans[1][0] is plans[2][0] is plans[2][2]
    assert plans[2][1] is None


def uploads_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of elements of each table that is filled in a step."""
    from selective.kernels.gpu import tables

    sizes: list[int] = []
    refill = tables.refill

    def counted(target: Any, values: Any) -> Any:
        sizes.append(target.numel())
        return refill(target, values)

    monkeypatch.setattr(tables, "refill", counted)
    return sizes


@pytest.mark.parametrize("change", ["nothing", "lr", "rest", "seed"])
def test_numbers_that_changed_are_uploaded_in_one_copy(change: str, device: str, monkeypatch) -> None:
    lists, specs = lists_of(ADAM, device), specs_of(ADAM, *KINDS["agreement"], 0, device)
    run_together(lists, specs)
    sizes = uploads_of(monkeypatch)
    for group in (0, 2):
        spec = specs[group]
        changed: dict[str, Callable[[], StepSpec]] = {
            "nothing": lambda spec=spec: spec,
            "lr": lambda spec=spec: replace(spec, rule=replace(spec.rule, lr=0.5)),
            "rest": lambda spec=spec: replace(spec, strength=replace(spec.strength, rest=0.75)),
            "seed": lambda spec=spec: replace(spec, draw=replace(spec.draw, seed=17)),
        }
        specs[group] = changed[change]()
    run_together(lists, specs)
    assert sizes == {"nothing": [], "lr": [3 * 20], "rest": [3 * 20], "seed": [3 * 2]}[change]


def test_hyper_parameters_of_each_group_are_uploaded_by_themselves(device: str) -> None:
    """For replays of a CUDA graph: what another group was told stays."""
    lists, specs = lists_of(ADAM, device), specs_of(ADAM, *KINDS["agreement"], 0, device)
    run_together(lists, specs)
    (groups,) = lists[0].cache["plan"].groups.values()
    before = groups.hyper.clone()
    for place, rest in ((2, 0.125), (0, 0.25)):
        lists[place].cache["upload_hyperparameters"](specs[place].selection, replace(specs[place].strength, rest=rest))
    changed = (groups.hyper != before).nonzero().tolist()
    assert [group for group, _ in changed] == [0, 2]
    assert [groups.hyper[group, column].item() for group, column in changed] == [0.25, 0.125]


def test_rates_that_are_tensors_on_the_device_are_read_there(device: str) -> None:
    together, apart = lists_of(ADAM, device), lists_of(ADAM, device)
    rate = torch.tensor(0.01, device=device)
    for step in range(2):
        specs = specs_of(ADAM, *KINDS["agreement"], step, device)
        for group in (0, 2):
            specs[group] = replace(specs[group], rule=replace(specs[group].rule, lr=rate))
        run_together(together, specs)
        run_apart(apart, specs)
        rate.mul_(0.5)
    for a, b in zip(together, apart, strict=True):
        assert_equal_items(a, b)


def test_a_decay_of_zero_is_a_factor_that_changes_no_bit(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups without decay share the code of those with it."""
    rule, results = replace(ADAM, weight_decay=0.0), []
    for has_factor in (configure._has_factor, lambda rule: False):
        monkeypatch.setattr(configure, "_has_factor", has_factor)
        (items, *_) = lists_of(rule, device)
        items[0].param[:4] = torch.tensor([0.0, -0.0, float("inf"), float("nan")], device=device)
        spec = StepSpec(rule, *KINDS["agreement"], Draw(0, 0), True)
        results.append((run_together([items], [spec]), [item.param.view(torch.int32) for item in items]))
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.parametrize("where", ["between steps", "in a hook of the base"])
def test_a_parameter_that_is_transposed_in_place_is_noticed(where: str, device: str) -> None:
    """Its address, dtype and shape stay. A hook runs after the wrapper has looked at parameters."""
    optimizers = []
    for backend in ("gpu", "reference"):
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(6, 6, generator=generator).to(device))
        optimizer = SelectiveUpdate(torch.optim.AdamW([p], lr=0.1), policy="CautiousMGUP")

        def transpose(*_: Any, p: Any = p) -> None:
            p.data = p.data.t()

        for step in range(4):
            p.grad = torch.randn(6, 6, generator=generator).to(device)
            if step == 2 and where == "between steps":
                transpose()
            hook = optimizer.base.register_step_pre_hook(transpose) if step == 2 and where != "between steps" else None
            with use_backend(backend):  # type: ignore[arg-type]
                optimizer.step()
            if hook is not None:
                hook.remove()
        optimizers.append(p.detach())
    torch.testing.assert_close(*optimizers)


@pytest.mark.gpu
def test_groups_on_two_devices_have_a_table_on_each(device: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    lists = [*lists_of(ADAM, "cuda:0")[:2], lists_of(ADAM, "cuda:1")[2]]
    apart = [*lists_of(ADAM, "cuda:0")[:2], lists_of(ADAM, "cuda:1")[2]]
    specs = specs_of(ADAM, *KINDS["agreement"], 0, "cpu")
    specs[2] = replace(specs[2], rule=replace(specs[2].rule, lr=torch.tensor(0.01, device="cuda:1")))
    assert run_together(lists, specs) == run_apart(apart, specs)
    groups = lists[0].cache["plan"].groups
    assert {str(d): sorted(table.here) for d, table in groups.items()} == {"cuda:0": [0, 1], "cuda:1": [2]}
    for a, b in zip(lists, apart, strict=True):
        assert_equal_items(a, b)


def test_rows_of_groups_that_are_elsewhere_are_not_filled(device: str) -> None:
    """A rate on another device would have to be waited for."""
    specs = specs_of(ADAM, *KINDS["agreement"], 0, device)
    specs[1] = replace(specs[1], rule=replace(specs[1].rule, lr=torch.zeros((), device="meta")))
    table = GroupTable(3, torch.device(device), {0, 2})
    table.update(specs)
    assert table.hyper[1].abs().sum() == 0
    assert [table.hyper[group, 0].item() for group in (0, 2)] == [specs[0].rule.lr, specs[2].rule.lr]
