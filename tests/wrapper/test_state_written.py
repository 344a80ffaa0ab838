"""State that is written from outside is taken, or refused with the reason; what belonged to others is let go."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from state_cases import (
    CASES,
    Case,
    assert_close,
    assert_same,
    members,
    numbers,
    pair,
    parameters,
    train,
    values,
    wrapped,
)
from torch import Tensor
from torch.optim import Optimizer

from selective import MGUP, Magma, SelectiveUpdate, Soap
from selective.plan.groups import Groups
from selective.state.entries import BASIS_SHAPE, BASIS_STEPS, MOMENTUM, POLICY, POLICY_STATE, PRECONDITIONER, SEED, STEP
from selective.state.undivided import Undivided

by_case = pytest.mark.parametrize("case", CASES, ids=str)

# --- another optimizer's, and other ways to write whole entries ---


@pytest.mark.parametrize("theirs", [None, "AdaDiag"])
def test_the_state_of_another_optimizer_is_judged_and_left_to_it(theirs: str | None) -> None:
    """Taken as it is, the basis would be the other one's too, and go where this one drops it."""
    p = torch.nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    first = SelectiveUpdate(torch.optim.AdamW([p]), policy=MGUP(), preconditioner=Soap(refresh_every=2))
    p.grad = torch.ones_like(p)
    for _ in range(3):
        first.step()
    second = SelectiveUpdate(torch.optim.AdamW([p]), policy=MGUP(), preconditioner=theirs)
    with pytest.raises(ValueError, match="another kind; it was not taken"):
        second.state[p] = first.state[p]
    names = set(first.state[p])
    alike = SelectiveUpdate(torch.optim.AdamW([p]), policy=MGUP(), preconditioner=Soap(refresh_every=2))
    alike.state[p] = first.state[p]
    for optimizer in (alike, second, first):
        optimizer.step()
    assert set(first.state[p]) == names
    assert alike.store.table[p] is not first.store.table[p]


@pytest.mark.parametrize(
    "write",
    [
        lambda v, x: v.copy_(x),
        lambda v, x: v.data.copy_(x),
        lambda v, x: v.detach().copy_(x),
        lambda v, x: v.__setitem__(..., x),
        lambda v, x: v.__setitem__(slice(None), x),
        lambda v, x: torch._foreach_copy_([v], [x]),  # type: ignore[attr-defined]
    ],
)
def test_all_of_an_entry_is_written_in_place(write: Callable[[Any, Tensor], Any]) -> None:
    p = torch.nn.Parameter(torch.ones(6, 4))
    opt = SelectiveUpdate(torch.optim.AdamW([p]), preconditioner=Soap())
    p.grad = torch.ones_like(p)
    opt.step()
    wanted = torch.eye(6).flip(0)[None]
    write(opt.state[p]["selective/basis/rows_basis"], wanted)
    assert torch.equal(opt.store.table[p]["selective/basis/rows_basis"], wanted)


# --- put back -------------------------------------------------------------------------------------------------------


def by_deepcopy(opt: Any) -> dict[Any, Any]:
    return {p: copy.deepcopy(entry) for p, entry in opt.state.items()}


def by_loop(opt: Any) -> dict[Any, Any]:
    return {p: {k: v.clone() for k, v in entry.items()} for p, entry in opt.state.items()}


def by_memory(opt: Any) -> dict[Any, Any]:
    """As code does that moves a state to other memory."""
    return {p: {k: torch.empty_like(v).copy_(v) for k, v in entry.items()} for p, entry in opt.state.items()}


def by_whole_slices(opt: Any) -> dict[Any, Any]:
    return {p: {k: v[...].reshape(v.shape).clone() for k, v in entry.items()} for p, entry in opt.state.items()}


def by_pickle(opt: Any) -> dict[Any, Any]:
    return {p: pickle.loads(pickle.dumps(entry)) for p, entry in opt.state.items()}


def whole(opt: Any, saved: dict[Any, Any]) -> None:
    for p, entries in saved.items():
        opt.state[p] = entries


def update(opt: Any, saved: dict[Any, Any]) -> None:
    opt.state.update(saved)


def assign(opt: Any, saved: dict[Any, Any]) -> None:
    opt.state = saved


def entry_by_entry(opt: Any, saved: dict[Any, Any]) -> None:
    for p, entries in saved.items():
        for key, value in entries.items():
            opt.state[p][key] = value


def in_place(opt: Any, saved: dict[Any, Any]) -> None:
    for p, entries in saved.items():
        for key, value in entries.items():
            opt.state[p][key].copy_(value)


def after_deleting(opt: Any, saved: dict[Any, Any]) -> None:
    opt.state.clear()
    whole(opt, saved)


WAYS = [(by_deepcopy, whole), (by_loop, update), (by_pickle, assign), (by_loop, entry_by_entry),
        (by_deepcopy, in_place), (by_loop, after_deleting), (by_memory, whole), (by_whole_slices, assign)]  # fmt: skip


def gone_back(case: Case, save: Callable[..., Any], put: Callable[..., Any]) -> tuple[Any, Any]:
    """Values and state after steps 3 to 5, and after the state of step 3 was put back and they were taken again."""
    opt = wrapped(case, parameters())
    train(opt, 0, 3)
    saved, start = save(opt), values(opt)
    train(opt, 3, 6)
    found = values(opt), by_loop(opt)
    with torch.no_grad():
        for p, value in zip(members(opt), start, strict=True):
            p.copy_(value)
    put(opt, saved)
    train(opt, 3, 6)
    return found, (values(opt), by_loop(opt))


@by_case
@pytest.mark.parametrize(("save", "put"), WAYS, ids=lambda way: way.__name__)
def test_a_state_that_is_put_back_goes_on_bit_for_bit(case: Case, save, put) -> None:
    assert_same(*gone_back(case, save, put))


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[6]], ids=str)
def test_without_our_entries_it_would_not(case: Case) -> None:
    def theirs(opt: Any) -> dict[Any, Any]:
        return {p: {k: v for k, v in entries.items() if k[:10] != "selective/"} for p, entries in by_loop(opt).items()}

    found, again = gone_back(case, theirs, whole)
    with pytest.raises(AssertionError):
        assert_same(found, again)


@by_case
def test_what_is_written_is_read_back(case: Case) -> None:
    opt = wrapped(case, parameters())
    train(opt, 0, 3)
    p = members(opt)[0]
    for key, value in opt.state[p].items():
        keeps = key in (POLICY, PRECONDITIONER, BASIS_SHAPE) or value.dtype == torch.bool
        new = copy.deepcopy(value) if keeps else copy.deepcopy(value) + 1
        opt.state[p][key] = new
        assert_same(opt.state[p][key], new)
    kept = {"step": torch.tensor(2.0), "exp_avg": numbers(p.shape, 7), "exp_avg_sq": numbers(p.shape, 8).square()}
    opt.state[p] = kept
    assert dict(opt.state[p]) == kept
    assert opt.base.state[p] is kept  # the very dictionary, as torch keeps it
    train(opt, 3, 5)
    assert kept["step"] == (3 if case.rotated else 4)  # a basis that is new takes a look at the first gradient


# --- loops over every entry but the step ------------------------------------------------------------------------------

KEEP = torch.tensor([True, False, True, True, False, True])


def pruned(value: Tensor) -> Tensor:
    return value[KEEP]


def by_index(value: Tensor) -> Tensor:
    return torch.index_select(value, 0, KEEP.nonzero()[:, 0])


def split(value: Tensor) -> Tensor:
    return torch.cat([value[KEEP], torch.zeros((2, *value.shape[1:]))])


def extended(value: Tensor) -> Tensor:
    return torch.cat((value, torch.zeros_like(value[:2])), dim=0)


def blank(value: Tensor) -> Tensor:
    return torch.zeros_like(value)


def moved(value: Tensor) -> Tensor:
    value[KEEP] = 0
    return value


def every_entry(state: Any, change: Callable[[Tensor], Tensor]) -> None:
    for key in list(state.keys()):
        if key != "step":
            state[key] = change(state[key])


def replace(opt: Optimizer, change: Callable[[Tensor], Tensor], loop: Callable[..., None] = every_entry) -> None:
    """Do as gsplat's strategies: change all parameters and their states alike, and put them in the place of the old."""
    for group in opt.param_groups:
        for index, p in enumerate(group["params"]):
            state = opt.state[p]
            del opt.state[p]
            loop(state, change)
            new = torch.nn.Parameter(p.detach().clone() if change in (blank, moved) else change(p.detach().clone()))
            group["params"][index] = new
            opt.state[new] = state


@by_case
@pytest.mark.parametrize("change", [pruned, by_index, split, extended, blank, moved], ids=lambda c: c.__name__)
def test_loops_over_every_entry_but_the_step_do_what_they_do_to_the_base(case: Case, change) -> None:
    bare, ours = pair(case)
    for opt in (bare, ours):
        train(opt, 0, 3)
        replace(opt, change)
        train(opt, 3, 6)
    assert_close(values(ours), values(bare))
    assert [p.shape for p in ours.state] == [p.shape for p in bare.state]
    assert ours.count.steps == 6
    for p, entries in ours.state.items():
        assert all(entries[k].shape == p.shape for k in entries if k in (MOMENTUM, "exp_avg"))
    ours.load_state_dict(copy.deepcopy(ours.state_dict()))


@by_case
def test_the_loop_over_items_and_the_names_that_a_library_knows(case: Case) -> None:
    def items(state: Any, change: Callable[[Tensor], Tensor]) -> None:
        for key, value in list(state.items()):
            if key != "step" and isinstance(value, Tensor):
                state[key] = change(value)

    def by_name(state: Any, change: Callable[[Tensor], Tensor]) -> None:
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = change(state[key])

    for loop in (items, by_name):
        bare, ours = pair(case)
        for opt in (bare, ours):
            train(opt, 0, 3)
            replace(opt, split, loop)
            train(opt, 3, 6)
        assert_close(values(ours), values(bare))


def test_lists_and_memory_of_entries_are_written_as_the_base_s() -> None:
    def scale(state: Any) -> None:
        torch._foreach_mul_([value for key, value in state.items() if key != "step"], 0.5)

    def zero(state: Any) -> None:
        for key, value in state.items():
            if key != "step":
                value.zero_()

    for case in CASES:
        bare, ours = pair(case)
        for opt in (bare, ours):
            train(opt, 0, 3)
            scale(opt.state[members(opt)[0]])
            zero(opt.state[members(opt)[1]])
            train(opt, 3, 6)
        assert_close(values(ours), values(bare))
        assert (ours.count.steps, ours.count.seed) == (6, 3)


def test_what_is_made_of_an_undivided_entry() -> None:
    count, matrix = (Undivided.of(value) for value in (torch.tensor(3), torch.eye(2)))
    assert not any(isinstance(x, Undivided) for x in (matrix @ matrix, matrix.norm(), count + 1, count * 2, count == 3))
    copies = (matrix.clone(), matrix.detach(), matrix.cpu(), matrix.to(torch.float64), matrix.data)
    assert all(isinstance(x, Undivided) and not x.cut_up for x in copies)
    cut = (
        matrix[0],
        matrix[0].clone() + 1,
        matrix * 0.5,
        count[1:],
        count * 0.5,
        torch.stack([matrix]),
        matrix.view(4),
    )
    assert all(isinstance(x, Undivided) and x.cut_up for x in cut)
    assert type(copy.deepcopy(matrix)) is Tensor and type(pickle.loads(pickle.dumps(matrix))) is Tensor
    with pytest.raises(RuntimeError):
        matrix @ torch.ones(3, 3)  # an operation that no such loop does: torch's own error
    other = torch.zeros(2, 2)
    assert type(other.add_(matrix)) is Tensor and other[0, 0] == 1


def test_the_original_gaussian_splatting_gets_no_state_before_the_first_step() -> None:
    bare, ours = pair(CASES[0])
    for opt in (bare, ours):
        p = members(opt)[0]
        assert opt.state.get(p) is None
        assert opt.state.get(p, 5) == 5
        with pytest.raises(KeyError):
            del opt.state[p]


def test_such_loops_break_on_entries_that_are_plain_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Undivided, "of", lambda value, write=None: value.clone())
    opt = wrapped(CASES[0], parameters())
    train(opt, 0, 3)
    with pytest.raises(IndexError):
        replace(opt, pruned)


def test_own_momentum_and_the_states_of_a_policy_are_cut_with_the_parameter() -> None:
    opt = wrapped(Case("scratch", False, True), parameters())
    train(opt, 0, 3)
    before = opt.state[members(opt)[0]][MOMENTUM].clone()
    average = opt.state[members(opt)[0]][POLICY_STATE + "average"].plain()
    replace(opt, pruned)
    entries = opt.state[members(opt)[0]]
    assert_same(entries[MOMENTUM], before[KEEP])
    assert_same(entries[POLICY_STATE + "average"].plain(), average)  # of the tensor as a whole


def test_a_basis_of_another_shape_starts_anew() -> None:
    opt = wrapped(CASES[1], parameters())
    train(opt, 0, 5)
    replace(opt, pruned)
    train(opt, 5, 6)
    entries = opt.state[members(opt)[0]]
    assert entries[BASIS_SHAPE].tolist() == [1, 4, 4]
    assert int(entries[BASIS_STEPS]) == 1
    replace(opt, blank)  # the parameter is as large as it was: so is the basis
    train(opt, 6, 7)
    assert int(opt.state[members(opt)[0]][BASIS_STEPS]) == 2


# --- removed ----------------------------------------------------------------------------------------------------------


def by_clear(opt: Any) -> None:
    opt.state.clear()


def by_del(opt: Any) -> None:
    for p in list(opt.state):
        del opt.state[p]


def by_pop(opt: Any) -> None:
    for p in list(opt.state):
        assert opt.state.pop(p)["exp_avg"].shape == p.shape


def by_popitem(opt: Any) -> None:
    while opt.state:
        opt.state.popitem()


def by_a_new_state(opt: Any) -> None:
    opt.state = defaultdict(dict)


def by_emptying(opt: Any) -> None:
    for entries in opt.state.values():
        entries.clear()
        assert dict(entries) == {}


def by_removing_entries(opt: Any) -> None:
    for entries in opt.state.values():
        for key in list(entries):
            del entries[key]
        assert len(entries) == 0


def by_setstate(opt: Any) -> None:
    opt.__setstate__({"state": defaultdict(dict)})


REMOVED = [by_clear, by_del, by_pop, by_popitem, by_a_new_state, by_emptying, by_removing_entries, by_setstate]


@by_case
@pytest.mark.parametrize("remove", REMOVED, ids=lambda remove: remove.__name__)
def test_after_state_was_removed_everything_starts_anew(case: Case, remove) -> None:
    opt = wrapped(case, parameters())
    train(opt, 0, 3)
    remove(opt)
    assert all(not entries for entries in opt.state.values())
    fresh = wrapped(case, [torch.nn.Parameter(value) for value in values(opt)])
    fresh.count.steps = opt.count.steps  # the optimizer's count, by which random masks are drawn
    for one in (opt, fresh):
        train(one, 3, 6)
    assert_same(values(opt), values(fresh))
    assert_same(opt.state_dict(), fresh.state_dict())


@pytest.mark.parametrize("missing", ["exp_avg", "step"])
def test_a_single_entry_that_the_rule_needs_is_asked_for_by_name(missing: str) -> None:
    opt = wrapped(CASES[0], parameters())
    train(opt, 0, 2)
    del opt.state[members(opt)[1]][missing]
    before = values(opt)
    with pytest.raises(ValueError, match=rf"param_groups\[0\]\[1\].*no '{missing}'.*del opt.state\[p\]"):
        train(opt, 2, 3)
    assert_same(values(opt), before)


def test_setdefault_and_a_step_count_that_is_a_number() -> None:
    for opt in pair(CASES[0]):
        p = members(opt)[0]
        given = {"step": torch.tensor(4.0), "exp_avg": torch.ones(6, 4), "exp_avg_sq": torch.ones(6, 4)}
        assert opt.state.setdefault(p, given)["step"] == 4
        assert opt.state.setdefault(p, {})["step"] == 4
    ours = pair(CASES[0])[1]
    p = members(ours)[0]
    ours.state[p] = {"step": 4, "exp_avg": torch.ones(6, 4), "exp_avg_sq": torch.ones(6, 4)}
    train(ours, 0, 1)
    assert_same(ours.state[p]["step"], torch.tensor(5.0))


# --- refused ----------------------------------------------------------------------------------------------------------

REFUSED = [
    ("selective/other", torch.ones(()), "does not know"),
    (STEP, torch.tensor(-1), "one integer"),
    (STEP, torch.tensor([1, 2]), "one integer"),
    (SEED, "x", "must be a tensor"),
    (POLICY, torch.zeros(512, dtype=torch.uint8), "can't be read"),
    (POLICY, "MGUP", "must be a tensor of bytes"),
    (MOMENTUM, 1.0, "must be a tensor"),
    (BASIS_STEPS, torch.ones(3, dtype=torch.int64), "must be torch.int64 of"),
    ("selective/basis/rows_basis", torch.eye(2)[None], "starts anew"),
]


@pytest.mark.parametrize(("key", "value", "why"), REFUSED, ids=lambda x: str(x)[:20])
def test_an_entry_that_cannot_be_taken_is_refused(key: str, value: Any, why: str) -> None:
    opt = wrapped(Case("scratch", True, True), parameters())
    train(opt, 0, 3)
    before, p = by_loop(opt), members(opt)[0]
    with pytest.raises((ValueError, TypeError), match=why):
        opt.state[p][key] = value
    assert_same(by_loop(opt), before)


@pytest.mark.parametrize(("key", "value", "why"), REFUSED[:-2], ids=lambda x: str(x)[:20])
def test_a_whole_state_with_such_an_entry_is_refused(key: str, value: Any, why: str) -> None:
    opt = wrapped(Case("scratch", True, True), parameters())
    train(opt, 0, 3)
    before, p = by_loop(opt), members(opt)[0]
    for write in (opt.state.__setitem__, lambda q, entries: setattr(opt, "state", {q: entries})):
        with pytest.raises((ValueError, TypeError), match=why):
            write(p, {**before[p], STEP: torch.tensor(1), key: value})
    assert_same(by_loop(opt), before)


def test_policy_and_preconditioner_of_another_kind_are_refused_and_other_numbers_taken() -> None:
    opt, other = (
        wrapped(CASES[1], parameters()),
        wrapped(CASES[1], parameters(), MGUP(alpha=1.5), Soap(refresh_every=7)),
    )
    train(opt, 0, 2), train(other, 0, 2)
    p, theirs = members(opt)[0], other.state[members(other)[0]]
    with pytest.raises(ValueError, match=r"is MGUP.*another kind"):
        opt.state[p][POLICY] = theirs[POLICY]
    opt.state[p][PRECONDITIONER] = theirs[PRECONDITIONER]
    train(opt, 2, 3)
    assert opt.preconditioner_groups[0]["refresh_every"] == 7


def test_what_does_not_fit_its_parameter_is_refused_by_the_next_step() -> None:
    own = Case("scratch", True, True)
    for case, key, why in (
        (own, MOMENTUM, r"param_groups\[0\]\[0\]' has shape \(6, 4\), and 'selective/momentum'.*\(5, 4\)"),
        (own, POLICY_STATE + "other", "'selective/state/other', which Magma"),
        (own, "selective/basis/other", "was given a basis that Soap"),
        (CASES[0], "exp_avg", r"'exp_avg' of its state has \(5, 4\), must have \(6, 4\)"),
        (CASES[2], "exp_avg", r"'exp_avg' of its state has \(5, 4\), must have \(6, 4\)"),
    ):
        opt = wrapped(case, parameters())
        train(opt, 0, 3)
        opt.state[members(opt)[0]][key] = torch.ones(5, 4)
        before = values(opt)
        for _ in range(2):
            with pytest.raises(ValueError, match=why):
                train(opt, 3, 4)
        assert_same(values(opt), before)


# --- let go -----------------------------------------------------------------------------------------------------------


@by_case
def test_nothing_of_a_replaced_parameter_is_kept_alive(case: Case) -> None:
    opt = wrapped(case, parameters())
    train(opt, 0, 3)
    old = [weakref.ref(p) for p in members(opt)]
    old += [weakref.ref(v) for p in members(opt) for v in opt.base.state[p].values() if v.dim()]
    old += [weakref.ref(v) for p in members(opt) for v in opt.store.table[p].values() if v.dim() > 1]
    replace(opt, pruned)
    for entries in opt.state.values():
        entries[POLICY_STATE + "unknown"] = torch.ones(3)
        del entries[POLICY_STATE + "unknown"]
    gc.collect()
    kept = [ref for ref in old if ref() is not None]
    assert not [ref for ref in kept if isinstance(ref(), torch.nn.Parameter)]  # before any step
    train(opt, 3, 4)
    gc.collect()
    assert not [ref for ref in old if ref() is not None]


@by_case
def test_deleted_state_is_free_at_once(case: Case) -> None:
    opt = wrapped(case, parameters())
    train(opt, 0, 3)
    old = [weakref.ref(v) for p in members(opt) for v in opt.base.state[p].values() if v.dim()]
    opt.runner.report = None  # what the last step reported of its bases is there until the next one
    old += [weakref.ref(v) for p in members(opt) for v in opt.store.table[p].values() if v.dim() > 1]
    opt.state.clear()
    gc.collect()
    assert not [ref for ref in old if ref() is not None]


def test_a_parameter_that_left_without_state_is_forgotten_in_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def left() -> tuple[int, bool]:
        params = parameters()
        opt = SelectiveUpdate(torch.optim.SGD(params, lr=0.1), policy=Magma(), momentum_beta=0.9)
        train(opt, 0, 2)
        old = weakref.ref(params.pop(0))
        opt.param_groups[0]["params"][0] = torch.nn.Parameter(torch.ones(3))
        train(opt, 2, 3)
        gc.collect()
        return len(opt.state), old() is None

    assert left() == (2, True)
    monkeypatch.setattr(Groups, "forget_removed", lambda self: None)
    assert left() == (3, False)


def test_an_entry_goes_on_when_its_state_was_deleted_and_keeps_no_parameter() -> None:
    opt = wrapped(CASES[6], parameters())
    train(opt, 0, 2)
    entry = opt.state[members(opt)[0]]
    before = {key: value.clone() for key, value in entry.items()}
    del opt.state[members(opt)[0]]
    assert_same(dict(entry), before)
    entry["exp_avg"] = torch.ones(2)
    assert not opt.state[members(opt)[0]]
    old = weakref.ref(opt.param_groups[0]["params"].pop(0))
    opt.explain()
    gc.collect()
    assert old() is None
    assert entry["exp_avg"].shape == (2,)


# --- torch's other ways ----------------------------------------------------------------------------------------------


@by_case
def test_setstate_does_what_it_does_to_the_base(case: Case) -> None:
    bare, ours = pair(case)
    for opt in (bare, ours):
        train(opt, 0, 3)
        group = {**opt.param_groups[0], "lr": 0.05}
        del group["amsgrad"]  # an older form, which the base's own __setstate__ completes
        opt.__setstate__({"param_groups": [group]})
        assert opt.param_groups[0]["lr"] == 0.05 and opt.param_groups[0]["amsgrad"] is False
        train(opt, 3, 5)
        opt.__setstate__({"state": defaultdict(dict), "param_groups": opt.param_groups})
        assert len(opt.state) == 0
        train(opt, 5, 7)
    assert_close(values(ours), values(bare))


@by_case
def test_torchs_own_load_state_dict_sets_all_of_ours_as_well(case: Case) -> None:
    first, second = wrapped(case, parameters()), wrapped(case, parameters())
    train(first, 0, 3)
    with torch.no_grad():
        for p, value in zip(members(second), values(first), strict=True):
            p.copy_(value)
    Optimizer.load_state_dict(second, copy.deepcopy(first.state_dict()))
    train(first, 3, 6), train(second, 3, 6)
    assert_same(values(second), values(first))


@pytest.mark.parametrize("state", [
    {"policy": None}, {"param_groups": [{"params": [0, 1]}]}, {"state": 3}, {"param_groups": []},
    {"state": {}, "param_groups": [{"params": [torch.ones(2)], "policy": "MGUP"}]},
], ids=str)  # fmt: skip
def test_setstate_refuses_the_rest_and_nothing_was_set(state: dict[str, Any]) -> None:
    opt = wrapped(CASES[1], parameters())
    train(opt, 0, 3)
    before, groups = by_loop(opt), opt.param_groups
    with pytest.raises(ValueError, match="nothing was set"):
        opt.__setstate__(state)
    assert opt.param_groups is groups
    assert_same(by_loop(opt), before)
    train(opt, 3, 4)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["copy", "pickle"])
@by_case
def test_copies_of_the_whole_go_on_as_before(case: Case, copied) -> None:
    opt = wrapped(case, parameters())
    train(opt, 0, 3)
    other = copied(opt)
    train(opt, 3, 5), train(other, 3, 5)
    assert_same(values(other), values(opt))
    assert_same(other.state_dict(), opt.state_dict())
    replace(other, pruned)
    train(other, 5, 6)


BOUND = [{"policy": "RandomMask"}, {"policy": Magma(), "preconditioner": Soap(refresh_every=2)}]


# torch's own module scripts a function while it is imported
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("bound", BOUND, ids=["random", "rotated"])
def test_zero_redundancy_resumes_bit_for_bit(bound: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available():
        pytest.skip("torch was built without distributed")
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def build() -> Any:
        base = SelectiveUpdate.bind(torch.optim.AdamW, **bound)
        return ZeroRedundancyOptimizer(parameters(), base, lr=1e-2)

    def resumed() -> tuple[Any, Any]:
        first, second = build(), build()
        train(first, 0, 5)
        first.consolidate_state_dict()
        saved = copy.deepcopy(first.state_dict())
        with torch.no_grad():
            for p, value in zip(members(second), values(first), strict=True):
                p.copy_(value)
        second.load_state_dict(saved)
        train(first, 5, 8), train(second, 5, 8)
        return values(first), values(second)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert_same(*resumed())
        # as it was: entries of ours were dropped from what was written
        monkeypatch.setattr("selective.state.writing.OptimizerStateBackend._own_of", lambda *ignored: None)
        monkeypatch.setattr("selective.state.writing._Computed.judge", lambda *ignored: lambda: None)
        with pytest.raises(AssertionError):
            assert_same(*resumed())
    finally:
        dist.destroy_process_group()
