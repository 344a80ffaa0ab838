"""Stacks of bases: steps in them are those that are taken bucket by bucket, and no change of the state is missed."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_optimizer import Lion
from rotated_twins import BASIS, SHAPES, both, bucket_by_bucket, build, in_stacks, members, numbers, step

from selective import (
    MGUP,
    AdaDiag,
    CautiousDecay,
    Dense,
    Eigenbasis,
    PreconditionerError,
    RandomDecay,
    RandomMask,
    SelectiveUpdate,
    Soap,
)
from selective.explain.stacks import TOGETHER
from selective.preconditioner import fallbacks, refresh_stacks, stacked
from selective.preconditioner import refresh as refreshing
from selective.preconditioner.solvers import SOLVERS, Solved
from selective.rotation import stacks
from selective.rotation.buffers import aligned
from selective.rotation.rotation import Rotation
from selective.rotation.stacks import Stacks

GRAM = BASIS + "rows_gram"


def outcome(optimizer: SelectiveUpdate) -> dict[str, Any]:
    found = {"params": [p.detach() for p in members(optimizer)], "statistics": optimizer.statistics()}
    return copy.deepcopy({**found, "states": [dict(optimizer.state[p]) for p in members(optimizer)]})


def assert_same(found: Any, expected: Any) -> None:
    # Products of six terms are rounded in another order if they are batched otherwise. Adam divides by a root.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, equal_nan=True)


SPACES = [
    Eigenbasis(), Soap(precision="tf32"), Eigenbasis(sides="one", solver="eigh", stagger=False),
    AdaDiag(sides="two", refresh_every=3), Eigenbasis(sides="rows", carry="rotate"),
]  # fmt: skip
BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1, amsgrad=True),
    "coupled": lambda groups: torch.optim.Adam(groups, lr=0.01, weight_decay=0.1, maximize=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True),
}


PAIRS = [
    pytest.param(space, base, id=f"{space}-{base}", marks=[] if base == "adamw" or place == 0 else [pytest.mark.slow])
    for place, space in enumerate(SPACES)
    for base in BASES
]


@pytest.mark.parametrize(("space", "base"), PAIRS)
def test_a_step_in_stacks_is_the_step_bucket_by_bucket(space: Any, base: str) -> None:
    def run() -> dict[str, Any]:
        optimizer = build(space, MGUP(), BASES[base])
        for number in range(6):
            step(optimizer, number)
        seen.append(in_stacks(optimizer))
        return outcome(optimizer)

    seen: list[list[bool]] = []
    assert_same(*both(run))
    assert seen == [[False, False], [True, True]]


OPTIONS: dict[str, tuple[dict[str, Any], bool]] = {  # and if they are stepped in stacks
    "a decay by the update": ({"policy": Dense(), "decay": CautiousDecay()}, True),
    "a decay by the update that is masked": ({"decay": CautiousDecay()}, False),
    "a decay at random": ({"decay": RandomDecay()}, False),
    "a mask in the original space": ({"mask_space": "original"}, False),
    "a policy's own code": ({"policy": lambda view: view.update.abs() > 1e-3}, False),
    "products in bfloat16": ({"space": Eigenbasis(precision="bfloat16")}, False),
    "a side that is left out": ({"space": Eigenbasis(max_state_ratio=2.5, start_step=2)}, True),
    "stochastic rounding": ({"stochastic_rounding": True, "dtype": torch.bfloat16}, True),
    "a random mask": ({"policy": RandomMask()}, True),
    "no momentum": ({"policy": Dense(), "make": lambda groups: torch.optim.SGD(groups, lr=0.01)}, True),
    "counts on the device": ({"make": lambda g: torch.optim.AdamW(g, lr=torch.tensor(0.01), capturable=True)}, True),
    "Lion": ({"make": lambda groups: Lion(groups, lr=0.001, weight_decay=0.1)}, True),
    "a base without a rule": ({"make": lambda groups: torch.optim.NAdam(groups, lr=0.01)}, False),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_stepped_in_stacks(name: str) -> None:
    """The results are the same, and so is what takes the other way."""
    options, planned = OPTIONS[name]

    def run() -> dict[str, Any]:
        optimizer = build(**{"shapes": (*SHAPES, (2, 12)), **options})
        for number in range(5):
            step(optimizer, number)
        seen.append(any(in_stacks(optimizer)))
        return outcome(optimizer)

    seen: list[bool] = []
    assert_same(*both(run))
    assert seen == [False, planned]
    said = build(**{"shapes": (*SHAPES, (2, 12)), **options}).explain()
    assert (TOGETHER in said) == planned
    assert ("few at a time: " in said) == (not planned and name != "a base without a rule")


@pytest.mark.parametrize(
    ("usual", "largest", "reason"),
    [(70, 300, None), (70, 200, "or one of more than"), (60, 300, "elements on average")],
)
def test_an_embedding_keeps_nobody_from_the_stacks(
    usual: int, largest: int, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One large matrix is part of the stacks if the group's matrices are small on average, and it is not too large."""
    shapes = ((60, 5), *[(4, 3)] * 8)  # 300 elements, and 12 each: 69.6 on average in the first group, of five
    monkeypatch.setattr(stacked, "USUAL", usual)
    monkeypatch.setattr(stacked, "LARGEST", largest)

    def run() -> dict[str, Any]:
        optimizer = build(Eigenbasis(max_dim=8), MGUP(), shapes=shapes)
        for number in range(4):
            step(optimizer, number)
        seen.append(in_stacks(optimizer))
        assert reason is None or reason in optimizer.explain()
        return outcome(optimizer)

    seen: list[list[bool]] = []
    assert_same(*both(run))
    assert seen == [[False, False], [reason is None, True]]


@pytest.mark.parametrize("view", ["conv", "experts", "rows:2", "columns:2"])
def test_a_view_of_several_matrices(view: Any) -> None:
    """Joined columns are not a part of a stack, and are stepped by themselves."""
    shapes = ((4, 6), (4, 6), (4, 3, 2, 2), (2, 4, 6), (4, 6))

    def run() -> dict[str, Any]:
        # the smaller side: a few gradients do not span the space of 24 columns, and a basis of the rest is arbitrary
        optimizer = build(Eigenbasis(sides="one", start_step=3), shapes=shapes, matrix_view=view)
        for number in range(6):
            step(optimizer, number)
        seen.append(in_stacks(optimizer)[0])
        return outcome(optimizer)

    seen: list[bool] = []
    assert_same(*both(run))
    assert seen == [False, view != "columns:2"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
@pytest.mark.parametrize("when", [2, 5])
def test_a_gradient_that_is_no_number_or_too_large(value: float, when: int) -> None:
    """It is left out of the averages, and counted. The square of 3e38 is no float32 number. Step 5 is a refresh."""

    def run() -> tuple[dict[str, float], list[torch.Tensor], Any]:
        optimizer = build(policy=Dense())
        for number in range(6):
            for index, p in enumerate(members(optimizer)):
                p.grad = numbers(p.shape, 100 * number + index)
                if index == 1 and number == when:
                    p.grad[0, 1] = value
            optimizer.step()
        states = [optimizer.state[members(optimizer)[i]] for i in (0, 1)]
        counts = {f"{i}{k}": float(s[k]) for i, s in enumerate(states) for k in (SKIPPED, BASIS + "skipped")}
        return counts, [s[GRAM].plain() for s in states], [dict(s) for s in states]

    SKIPPED = "selective/basis_skipped"
    (counts, grams, states), expected = both(run)
    assert_same((counts, grams, states), expected)
    finite = value == 3e38
    assert counts == {f"0{SKIPPED}": 0, f"0{BASIS}skipped": 0, f"1{SKIPPED}": not finite, f"1{BASIS}skipped": finite}
    assert all(gram.isfinite().all() for gram in grams)


def test_many_rounds_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[torch.Tensor]:
        optimizer = build()
        for number in range(5):
            step(optimizer, number)
        rounds.append(len(optimizer.groups.plans[0].kept_step._step.rounds))
        return [p.detach() for p in members(optimizer)]

    rounds: list[int] = []
    whole = run()
    monkeypatch.setattr("selective.rotation.rotation.ROTATED", 30)
    assert_same(run(), whole)
    assert rounds == [1, 3]


# --- refreshes ---


@pytest.mark.parametrize("statistic", ["ema", "gradient"])
def test_a_refresh_in_parts_is_that_of_all_together(statistic: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part is one bucket here, where a large GPU has all of them in one. The host looks once for each part."""

    def run(limit: int) -> tuple[dict[str, Any], int]:
        looks.clear()
        for place in ("rotation.rotation", "preconditioner.refresh_stacks"):
            monkeypatch.setattr(f"selective.{place}.refreshed_at_once", lambda _: limit)
        optimizer = build(Eigenbasis(statistic=statistic, solver="cholesky", refresh_every=2))
        for number in range(6):
            step(optimizer, number)
        return outcome(optimizer), len(looks)

    looks: list[int] = []
    solve = refresh_stacks.solve_and_read
    monkeypatch.setattr(refresh_stacks, "solve_and_read", lambda *given: (looks.append(1), solve(*given))[1])
    (found, many), (expected, few) = run(1), run(2**28)
    assert_same(found, expected)
    assert many > few > 0


@pytest.mark.parametrize("carry", ["squared", "rotate", "keep"])
@pytest.mark.parametrize("statistic", ["ema", "gradient"])
def test_solvers_that_fail_are_rescued_in_stacks_too(
    statistic: Any, carry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result that is not orthogonal is computed in float64. What has no basis then keeps the old one."""
    real, asked = SOLVERS["eigh"], []

    def wrong(gram: torch.Tensor, old: torch.Tensor, sort: bool = True) -> Solved:
        solved = real(gram, old, sort)
        asked.append(gram.dtype)
        is_bad = gram[:, 0, 0] < (0.9 if gram.dtype == torch.float32 else 0.5)
        return solved._replace(basis=torch.where(is_bad[:, None, None], 2 * solved.basis, solved.basis))

    def run() -> dict[str, Any]:
        optimizer = build(Eigenbasis(statistic=statistic, solver="eigh", carry=carry, refresh_every=2, start_step=3))
        for number in range(8):
            step(optimizer, number)
        return outcome(optimizer)

    monkeypatch.setitem(SOLVERS, "eigh", wrong)
    monkeypatch.setattr(refreshing, "eigh", wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # bases stay as they are
        found, expected = both(run)
    assert_same(found, expected)
    counts = [[float(state[BASIS + name]) for state in found["states"] if GRAM in state or BASIS + "noise" in state]
              for name in ("float64", "kept")]  # fmt: skip
    assert sum(counts[0]) > 0 and sum(counts[1]) > 0
    assert torch.float64 in asked


def test_maps_that_were_formed_too_early_are_not_kept_for_the_fallbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are as large as all bases of a part, and a fallback needs memory of its own."""
    real, turn, try_again = SOLVERS["eigh"], refresh_stacks.turn, fallbacks._try_again
    formed: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def noted(*given: Any) -> torch.Tensor:
        formed.append(weakref.ref(result := turn(*given)))
        return result

    def counting(*given: Any) -> Any:
        alive.append(sum(map_() is not None for map_ in formed))
        return try_again(*given)

    def wrong(gram: torch.Tensor, old: torch.Tensor, sort: bool = True) -> Solved:
        solved = real(gram, old, sort)
        return solved._replace(basis=2 * solved.basis) if gram.dtype == torch.float32 else solved

    monkeypatch.setitem(SOLVERS, "eigh", wrong)
    monkeypatch.setattr(refresh_stacks, "turn", noted)
    monkeypatch.setattr(fallbacks, "_try_again", counting)
    optimizer = build(Eigenbasis(solver="eigh", refresh_every=2, start_step=1))
    for number in range(6):
        step(optimizer, number)
    assert formed and alive
    assert max(alive) == 0


def test_an_error_in_a_refresh_changes_no_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = build()
    for number in range(4):
        step(optimizer, number)
    before = [{k: v.clone() for k, v in live(optimizer, i).items() if k.startswith(BASIS)} for i in (0, 1, 3, 4, 5, 6)]
    monkeypatch.setattr("selective.preconditioner.refresh_stacks.carries", fails)
    step(optimizer, 4)
    with pytest.raises(PreconditionerError, match=r"Eigenbasis\.refresh failed: no maps"):
        step(optimizer, 5)
    step_4 = {"rows_gram", "columns_gram"}
    for i, entries in zip((0, 1, 3, 4, 5, 6), before, strict=True):
        for key, value in entries.items():
            same = torch.equal(value, live(optimizer, i)[key])
            assert same != (key.removeprefix(BASIS) in step_4), key


def fails(*_: Any) -> None:
    raise RuntimeError("no maps")


def test_shapes_take_turns() -> None:
    """Matrices of one shape in a group are refreshed in one step, and other shapes in other ones."""
    optimizer = build(Eigenbasis(stagger="shapes", refresh_every=10))
    rotated = [i for i, shape in enumerate(SHAPES) if len(shape) == 2]
    turns: dict[int, list[int]] = {i: [] for i in rotated}
    for number in range(32):
        before = {i: int(live(optimizer, i)[BASIS + "refreshes"]) if number else 0 for i in rotated}
        step(optimizer, number)
        for i in rotated:
            if int(live(optimizer, i)[BASIS + "refreshes"]) > before[i]:
                turns[i].append(number)
    kinds = [[0, 1], [3], [4], [5], [6]]  # by group and shape
    assert all(turns[i] == turns[kind[0]] for kind in kinds for i in kind)
    firsts = [turns[kind[0]][0] for kind in kinds]
    assert firsts == [1, 3, 5, 7, 9]  # five turns in a first round of ten steps
    for kind in kinds:
        assert {b - a for a, b in zip(turns[kind[0]][1:], turns[kind[0]][2:], strict=False)} == {10}


# --- what is changed from outside ---


def live(optimizer: SelectiveUpdate, index: int = 0) -> dict[str, torch.Tensor]:
    return optimizer.store.table[members(optimizer)[index]]


def other_checkpoint(optimizer: SelectiveUpdate) -> None:
    other = build()
    for number in range(50, 54):
        step(other, number)
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))


def saved_file(optimizer: SelectiveUpdate) -> None:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file))


def loaded_in_place(optimizer: SelectiveUpdate) -> None:
    """As torch.distributed.checkpoint writes into the tensors that it is given."""
    for entries in optimizer.state_dict()["state"].values():
        for key in (GRAM, "exp_avg"):
            if key in entries:
                entries[key].mul_(2.0)


def other_entry(optimizer: SelectiveUpdate) -> None:
    state = optimizer.state[members(optimizer)[1]]
    state[GRAM] = 2 * state[GRAM].plain()


def copied_into_an_entry(optimizer: SelectiveUpdate) -> None:
    entry = optimizer.state[members(optimizer)[1]][GRAM]
    entry.copy_(2 * entry.plain())


def whole_state(optimizer: SelectiveUpdate) -> None:
    p = members(optimizer)[0]
    optimizer.state[p] = {k: (v.plain() if hasattr(v, "plain") else v).clone() for k, v in optimizer.state[p].items()}


def other_memory(optimizer: SelectiveUpdate) -> None:
    """The tensors of the entries stay, and what they held does not."""
    for index in (0, 1):
        entry = live(optimizer, index)[GRAM]
        entry.data = 2 * entry


def exchanged_memory(optimizer: SelectiveUpdate) -> None:
    entry = live(optimizer)[GRAM]
    entry.set_(torch.full_like(entry, 0.5))  # pyright: ignore[reportArgumentType]


def other_bases_state(optimizer: SelectiveUpdate) -> None:
    p = members(optimizer)[0]
    optimizer.base.state[p] = {k: 2 * v for k, v in optimizer.base.state[p].items()}


def no_state(optimizer: SelectiveUpdate) -> None:
    del optimizer.state[members(optimizer)[0]]


def other_data(optimizer: SelectiveUpdate) -> None:
    for p in members(optimizer):
        p.data = numbers(p.shape, 10)


def to_bfloat16(optimizer: SelectiveUpdate) -> None:
    for p in members(optimizer):
        p.grad = None
        p.data = p.data.bfloat16()


def transposed_memory(optimizer: SelectiveUpdate) -> None:
    for p in members(optimizer):
        if p.dim() == 2:
            p.data = p.data.T.contiguous().T


def swapped(optimizer: SelectiveUpdate) -> None:
    p = members(optimizer)[0]
    p.grad = None
    torch.utils.swap_tensors(p, torch.nn.Parameter(numbers(p.shape, 11)))


def removed(optimizer: SelectiveUpdate) -> None:
    p = optimizer.param_groups[0]["params"].pop(1)
    optimizer.state.pop(p)


def other_parameter(optimizer: SelectiveUpdate) -> None:
    old = optimizer.param_groups[0]["params"][1]
    optimizer.param_groups[0]["params"][1] = torch.nn.Parameter(numbers(old.shape, 9))
    optimizer.state.pop(old)


def other_order(optimizer: SelectiveUpdate) -> None:
    optimizer.param_groups[0]["params"].reverse()


def new_group(optimizer: SelectiveUpdate) -> None:
    optimizer.add_param_group({"params": [torch.nn.Parameter(numbers((6, 4), 7))]})


def missing_gradients(optimizer: SelectiveUpdate) -> None:
    for number, missing in enumerate([[0], [0, 3], [], [1], list(range(7)), [6]]):
        step(optimizer, 30 + number, without=missing)


def hyper_parameters(optimizer: SelectiveUpdate) -> None:
    optimizer.param_groups[0]["lr"] = 0.02
    optimizer.param_groups[1]["weight_decay"] = 0.3
    optimizer.preconditioner_groups[0]["beta"] = 0.5


def other_policy(optimizer: SelectiveUpdate) -> None:
    optimizer.policy_groups[0].policy = MGUP()


def inference_mode(optimizer: SelectiveUpdate) -> None:
    with torch.inference_mode():
        step(optimizer, 40)


CHANGES: list[Callable[[SelectiveUpdate], None]] = [
    other_checkpoint, saved_file, loaded_in_place, other_entry, copied_into_an_entry, whole_state, other_memory,
    exchanged_memory, other_bases_state, no_state, other_data, to_bfloat16, transposed_memory, swapped, removed,
    other_parameter, other_order, new_group, missing_gradients, hyper_parameters, other_policy, inference_mode,
]  # fmt: skip


def trained(change: Callable[[SelectiveUpdate], None]) -> dict[str, Any]:
    optimizer = build()
    for number in range(6):
        if number == 4:
            change(optimizer)
        step(optimizer, number)
    return outcome(optimizer)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change: Callable[[SelectiveUpdate], None]) -> None:
    found, expected = both(lambda: trained(change))
    if change is to_bfloat16:  # a difference of one rounding
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-9)
    else:
        assert_same(found, expected)


@pytest.mark.parametrize(
    ("change", "blind"),
    [(other_memory, "are_in_place"), (exchanged_memory, "are_in_place"), (other_entry, "are_of")],
)
def test_the_comparison_would_catch_stacks_that_are_not_looked_at(change, blind, monkeypatch) -> None:
    right = trained(change)
    monkeypatch.setattr(Stacks, blind, lambda self, *_: True)
    with pytest.raises(AssertionError):
        assert_same(trained(change), right)


def test_a_parameter_that_joins_late_joins_the_stacks() -> None:
    def run() -> dict[str, Any]:
        optimizer = build()
        for number in range(8):
            step(optimizer, number, without=[1] if number < 4 else [])
            seen.append(in_stacks(optimizer)[0])
        return outcome(optimizer)

    seen: list[bool] = []
    assert_same(*both(run))
    assert seen == [False] * 8 + [True] * 8


def test_without_a_gradient_of_one_nobody_is_stepped_in_stacks() -> None:
    optimizer, taken = build(), []
    with pytest.MonkeyPatch.context() as patch:
        real = Rotation.observe
        patch.setattr(Rotation, "observe", lambda *a: (taken.append(True), real(*a))[1])
        for number in range(5):
            step(optimizer, number, without=[0] if number == 3 else [])
    assert taken == [True]  # the first group of the fourth step: bucket by bucket


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_has_stacks_of_its_own(copied: Callable[[Any], Any]) -> None:
    optimizer = build()
    for number in range(5):
        step(optimizer, number)
    other = copied(optimizer)
    for number in range(5, 8):
        step(optimizer, number)
    before = outcome(optimizer)
    for number in range(5, 8):
        step(other, number)
    assert_same(outcome(other), before)
    assert_same(outcome(optimizer), before)


# --- memory ---


def test_a_saved_entry_does_not_carry_its_stack() -> None:
    optimizer = build(shapes=[(24, 24)] * 12)
    for number in range(3):
        step(optimizer, number)
    entries = optimizer.state_dict()["state"][0]
    assert in_stacks(optimizer)[0]
    for key, value in entries.items():
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), key
    file, plain = io.BytesIO(), io.BytesIO()
    torch.save(entries, file)
    torch.save({key: value.clone() for key, value in entries.items()}, plain)
    assert file.tell() == plain.tell()
    kept = optimizer.groups.plans[0].kept_bases
    assert kept.stacks is not None
    stack = kept.stacks.buckets[0].state["rows_basis"]
    assert stack.nbytes == 5 * entries[BASIS + "rows_basis"].nbytes  # the twin: a view of it would save all five
    torch.save(stack[:1], twin := io.BytesIO())
    assert twin.tell() > stack.nbytes


def test_what_is_saved_in_stacks_goes_on_without_and_the_other_way() -> None:
    def saved() -> dict[str, Any]:
        optimizer = build()
        for number in range(5):
            step(optimizer, number)
        return copy.deepcopy(optimizer.state_dict())

    def gone_on(state: dict[str, Any]) -> dict[str, Any]:
        optimizer = build()
        optimizer.load_state_dict(state)
        for number in range(5, 8):
            step(optimizer, number)
        return outcome(optimizer)

    in_stack, plain = both(saved)
    assert_same(in_stack, plain)
    with pytest.MonkeyPatch.context() as patch:
        bucket_by_bucket(patch)
        expected = gone_on(in_stack)
    assert_same(gone_on(plain), expected)


def test_buffers_have_memory_in_a_step_alone() -> None:
    optimizer = build()
    for number in range(3):
        step(optimizer, number)
    (one_round,) = optimizer.groups.plans[0].kept_step._step.rounds
    assert [buffer.flat.untyped_storage().nbytes() for buffer in one_round.buffers] == [0, 0, 0]
    with one_round.given.in_use():
        assert one_round.given.flat.untyped_storage().nbytes() == 4 * one_round.given.flat.numel()


def test_what_is_halfway_has_room_for_the_largest_shape_with_two_sides() -> None:
    """With max_dim=8 the embedding has one side, and needs one product."""
    optimizer = build(Eigenbasis(max_dim=8), shapes=((60, 5), *[(4, 3)] * 8))
    for number in range(3):
        step(optimizer, number)
    embedding, others = (plan.kept_step._step.rounds for plan in optimizer.groups.plans)
    assert [one.halfway.flat.numel() for one in embedding] == [aligned(4 * 12)]
    assert [one.halfway.flat.numel() for one in others] == [aligned(4 * 12)]
    alone = build(Eigenbasis(sides="rows"))
    for number in range(3):
        step(alone, number)
    assert [plan.kept_step._step.rounds[0].halfway.flat.numel() for plan in alone.groups.plans] == [0, 0]


def test_entries_are_there_once() -> None:
    """Stacks have the memory of the entries, and a parameter that is removed is not kept in them."""
    optimizer = build()
    for number in range(3):
        step(optimizer, number)
    removed(optimizer)
    step(optimizer, 3)
    kept = optimizer.groups.plans[0].kept_bases
    assert kept.stacks is not None
    wholes = [x for bucket in kept.stacks.buckets for name, x in bucket.state.items() if x.dim() == 3]
    entries = [v for basis in kept.bases for v in basis.state.values() if v.dim() == 3]
    assert len(kept.parameters) == len([s for s in SHAPES[:5] if len(s) == 2]) - 1
    assert sum(x.nbytes for x in wholes) == sum(v.nbytes for v in entries)
    assert sum(x.untyped_storage().nbytes() for x in wholes) == sum(v.nbytes for v in entries)
    starts = {x.data_ptr() for x in wholes}
    assert all(any(start <= v.data_ptr() for start in starts) for v in entries)


def test_one_stack_at_a_time_is_there_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors that a stack replaces are free before the next one is made: at first, and when a parameter joins."""
    replaced: list[weakref.ref[torch.Tensor]] = []
    real = stacks._stacked

    def watched(name: str, tables: Any) -> torch.Tensor:
        assert not any(ref() is not None for ref in replaced)
        replaced.extend(weakref.ref(table[name]) for table in tables if table[name].dim() == 3)
        return real(name, tables)

    monkeypatch.setattr(stacks, "_stacked", watched)
    optimizer = build(shapes=[(6, 4), (6, 4), (4, 6)])
    for number in range(3):
        step(optimizer, number, without=[2] if number < 2 else [])
    assert len(replaced) > 2 * 4 and in_stacks(optimizer)[0]
    assert not any(ref() is not None for ref in replaced)
