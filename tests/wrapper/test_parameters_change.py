"""Parameters that change under the optimizer: stepped as the base steps them, or refused by name with the way out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from state_cases import (
    CASES,
    ONES,
    STILL,
    Case,
    assert_close,
    assert_same,
    base_of,
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

from selective import MGUP, Dense, SelectiveUpdate, Soap, param_groups_for
from selective.kernels import use_backend
from selective.plan.shared_parameters import _have_one_in_common
from selective.state.entries import BASIS_STEPS, MOMENTUM

by_case = pytest.mark.parametrize("case", CASES, ids=str)

# --- grown and shrunk in place ----------------------------------------------------------------------------------------


def larger(value: Tensor) -> Tensor:
    return torch.cat([value, value[:2] * 0])


def smaller(value: Tensor) -> Tensor:
    return value[1:-1].clone()


def other(value: Tensor) -> Tensor:
    """As many elements in another shape."""
    return value.reshape(2, -1, *value.shape[2:]).contiguous() if value.dim() > 1 else value.clone()


def by_data(p: Tensor, value: Tensor) -> None:
    p.data = value


def by_set(p: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        p.set_(value)


def with_state(opt: Optimizer, change: Callable[[Tensor], Tensor], put: Callable[..., None], first: str) -> None:
    """Parameters and their moments, in either order."""

    def entries(p: Any) -> None:
        state = opt.state[p]
        for key in list(state):
            if key != "step":
                state[key] = change(state[key])

    for p in members(opt):
        if first == "state":
            entries(p)
        put(p, change(p.detach()))
        if first != "state":
            entries(p)


@by_case
@pytest.mark.parametrize("change", [larger, smaller, other], ids=lambda change: change.__name__)
@pytest.mark.parametrize(("put", "first"), [(by_data, "state"), (by_set, "memory")], ids=["data", "set"])
def test_one_that_is_changed_with_its_state_is_stepped_as_by_the_base(case: Case, change, put, first: str) -> None:
    bare, ours = pair(case)
    for opt in (bare, ours):
        train(opt, 0, 3)
        with_state(opt, change, put, first)
        train(opt, 3, 6)
    assert_close(values(ours), values(bare))
    if case.own:
        assert all(ours.state[p][MOMENTUM].shape == p.shape for p in members(ours))


@by_case
@pytest.mark.parametrize("change", [larger, smaller], ids=lambda change: change.__name__)
def test_one_that_is_changed_alone_is_refused_by_name(case: Case, change) -> None:
    opt = wrapped(case, parameters())
    train(opt, 0, 3)
    p = members(opt)[0]
    p.data = change(p.data)
    rows = p.shape[0]
    found = rf"param_groups\[0\]\[0\]' has shape \({rows}, 4\), and 'exp_avg' of its state has \(6, 4\).*del opt.state"
    before, count = values(opt), opt.state[members(opt)[1]]["step"].clone()
    for _ in range(2):
        with pytest.raises(ValueError, match=found):
            train(opt, 3, 4)
    assert_same(values(opt), before)
    assert opt.state[members(opt)[1]]["step"] == count
    del opt.state[p]
    train(opt, 3, 6)
    assert opt.state[p]["exp_avg"].shape == p.shape


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("base", ["Adafactor", "RMSprop", "Adagrad", "NAdam"])
def test_moments_and_factors_of_other_bases_are_named_too(base: str, rotated: bool) -> None:
    rotation = {"preconditioner": Soap(refresh_every=2)} if rotated else {}
    opt = SelectiveUpdate(getattr(torch.optim, base)(parameters(), lr=0.01), policy="Grams", **rotation)
    train(opt, 0, 3)
    p = members(opt)[0]
    p.data = larger(p.data)
    before = values(opt)
    with pytest.raises(
        ValueError, match=r"param_groups\[0\]\[0\]' has shape \(8, 4\), and '\w+' of its state has \(6,"
    ):
        train(opt, 3, 4)
    assert_same(values(opt), before)


@by_case
def test_without_the_check_it_would_be_stepped_on_memory_of_another_shape(case: Case, monkeypatch) -> None:
    monkeypatch.setattr("selective.state.check_before_step._check_base_entries", lambda *ignored: None)
    opt = wrapped(case, parameters())
    train(opt, 0, 3)
    p = members(opt)[0]
    p.data = larger(p.data)
    with pytest.raises((RuntimeError, ValueError, KeyError)) as raised:  # whatever is met first
        train(opt, 3, 5)
    assert "param_groups[0][0]' has shape" not in str(raised.value)


@by_case
def test_a_gradient_of_the_shape_before_is_refused(case: Case) -> None:
    opt = wrapped(case, parameters())
    p = members(opt)[0]
    for one in members(opt):
        one.grad = torch.ones_like(one)
    p.data = larger(p.data)
    before = values(opt)
    with pytest.raises(ValueError, match=r"param_groups\[0\]\[0\]' has shape \(8, 4\), its gradient \(6, 4\)"):
        opt.step()
    assert_same(values(opt), before)
    opt.zero_grad()
    train(opt, 0, 3)


def test_a_momentum_of_our_own_that_nobody_cut_starts_anew() -> None:
    case = Case("delta", True, True)
    opt = wrapped(case, parameters())
    train(opt, 0, 4)
    for p in members(opt):
        p.data = larger(p.data)
        for key in ("exp_avg", "exp_avg_sq"):
            opt.state[p][key] = larger(opt.state[p][key])
    train(opt, 4, 5)
    p = members(opt)[0]
    assert opt.state[p][MOMENTUM].shape == p.shape
    assert int(opt.state[p][BASIS_STEPS]) == 1
    train(opt, 5, 7)


@pytest.mark.parametrize("rotated", [False, True])
def test_the_tables_of_the_kernels_follow(rotated: bool) -> None:
    """Rotated by columns: of the rows, a first basis of one gradient is arbitrary in part, and follows rounding."""

    def trained(backend: Any) -> list[Tensor]:
        space = Soap(refresh_every=2, sides="columns")
        opt = wrapped(Case("fused", rotated, False), parameters(), MGUP(), space)
        with use_backend(backend):
            train(opt, 0, 2)
            with_state(opt, larger, by_data, "state")
            train(opt, 2, 4)
            with_state(opt, smaller, by_set, "memory")
            train(opt, 4, 6)
        return values(opt)

    for ours, expected in zip(trained("gpu"), trained("reference"), strict=True):
        assert_close(ours, expected)


# --- replaced ---------------------------------------------------------------------------------------------------------


@by_case
@pytest.mark.parametrize("rows", [6, 3, 9])
def test_one_that_takes_the_place_of_another_starts_anew(case: Case, rows: int) -> None:
    bare, ours = pair(case)
    for opt in (bare, ours):
        train(opt, 0, 3)
        old = members(opt)[0]
        opt.param_groups[0]["params"][0] = torch.nn.Parameter(numbers((rows, 4), 5))
        train(opt, 3, 6)
        assert opt.state[old]["exp_avg"].shape == (6, 4)  # the base keeps it until somebody deletes it
        assert len(opt.state) == 3
    assert_close(values(ours), values(bare))
    with pytest.raises(
        ValueError, match=r"1 parameter\(s\) that are in no group, one of shape \(6, 4\).*del opt.state"
    ):
        ours.state_dict()
    del ours.state[old]
    assert len(ours.state_dict()["state"]) == 2
    train(ours, 6, 7)


@by_case
def test_one_that_left_for_a_while_goes_on(case: Case) -> None:
    """Frozen by taking it out of its group: the base keeps its state, and so do we."""
    opt, twin = wrapped(case, parameters()), wrapped(case, parameters())
    for one in (opt, twin):
        train(one, 0, 3)
    taken = opt.param_groups[0]["params"].pop()
    opt.explain()
    opt.param_groups[0]["params"].append(taken)
    for one in (opt, twin):
        train(one, 3, 6)
    assert_same(values(opt), values(twin))


# --- without a shape yet ----------------------------------------------------------------------------------------------


def lazy_model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.LazyLinear(5), torch.nn.Tanh(), torch.nn.Linear(5, 2))


def initialize(model: torch.nn.Module) -> None:
    model(torch.ones(1, 3))
    with torch.no_grad():
        for index, p in enumerate(model.parameters()):
            p.copy_(numbers(p.shape, index))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")  # torch's own
@by_case
def test_parameters_that_get_their_shape_later_are_stepped_as_if_they_had_had_it(case: Case) -> None:
    late, early = lazy_model(), lazy_model()
    initialize(early)
    ours, expected = wrapped(case, late.parameters()), wrapped(case, early.parameters())
    assert "2 tensors without a shape yet" in ours.explain()
    ours.init_state()
    for p in members(ours)[2:]:
        p.grad = torch.ones_like(p)
    ours.zero_grad()
    assert set(ours.state_dict()["state"]) == {2, 3}
    ours.state.clear()
    initialize(late)
    for opt in (ours, expected):
        train(opt, 0, 4)
    assert_same(values(ours), values(expected))
    assert_same(ours.state_dict(), expected.state_dict())


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@by_case
def test_a_checkpoint_is_loaded_before_they_have_a_shape(case: Case) -> None:
    first, model = lazy_model(), lazy_model()
    initialize(first)
    opt = wrapped(case, first.parameters())
    train(opt, 0, 3)
    resumed = wrapped(case, model.parameters())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    model.load_state_dict(first.state_dict())
    for one in (opt, resumed):
        train(one, 3, 5)
    assert_same(values(resumed), values(opt))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_sorting_a_model_by_shapes_asks_for_them() -> None:
    with pytest.raises(ValueError, match=r"0 has a parameter 'weight' without a shape yet.*run one batch"):
        param_groups_for(lazy_model())


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize("base", [torch.optim.NAdam, torch.optim.Adafactor, torch.optim.SGD], ids=lambda b: b.__name__)
def test_other_bases_wait_for_them_too(base: Any) -> None:
    found = []
    for wrap in (False, True):
        model = lazy_model()
        opt = base(model.parameters(), lr=0.01)
        opt = SelectiveUpdate(opt, policy=ONES if base is torch.optim.NAdam else Dense()) if wrap else opt
        initialize(model)
        train(opt, 0, 4)
        found.append(values(opt))
    assert_close(*found)


# --- twice ------------------------------------------------------------------------------------------------------------

TWICE = pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate:UserWarning")  # torch's


@TWICE
@by_case
def test_a_parameter_that_is_named_twice_is_refused_where_it_is_wrapped(case: Case) -> None:
    params = parameters()
    with pytest.raises(ValueError, match=r"param_groups\[0\]\[0\]' is named a second time, as 'param_groups\[0\]\[2\]"):
        wrapped(case, [*params, params[0]])
    opt = wrapped(case, params)
    train(opt, 0, 2)
    before = values(opt)
    for there, taken in ((opt.param_groups[0]["params"], "append"), (opt.base.param_groups, "group")):
        there.append(params[0] if taken == "append" else {**opt.param_groups[0], "params": [params[1]]})
        for p in params:
            p.grad = torch.ones_like(p)
        with pytest.raises(ValueError, match="is named a second time"):
            opt.step()
        assert_same([p.detach() for p in params], before)
        there.pop()
        del opt.policy_groups[1:]
    train(opt, 2, 4)
    with pytest.raises(ValueError, match="is named a second time"):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))] * 2})
    train(opt, 4, 5)


@TWICE
def test_in_a_group_that_is_left_to_the_base_it_is_stepped_twice() -> None:
    found = []
    for wrap in (False, True):
        params = parameters()
        opt = base_of([{"params": [*params, params[0]], "policy": None}] if wrap else [*params, params[0]])
        opt = SelectiveUpdate(opt, policy=MGUP()) if wrap else opt
        train(opt, 0, 3)
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        train(opt, 3, 5)
        found.append((values(opt), opt.state_dict()["state"]))
    assert_same(*found)


# --- one memory -------------------------------------------------------------------------------------------------------


def the_same(flat: Tensor) -> list[Tensor]:
    return [flat[:24].view(6, 4), flat[:24].view(4, 6)]


def overlapping(flat: Tensor) -> list[Tensor]:
    return [flat[:24].view(6, 4), flat[20:40].view(5, 4)]


def interleaved(flat: Tensor) -> list[Tensor]:
    return [flat.view(8, 5)[:, :3], flat.view(8, 5)[:, 2:]]


def one_beside_the_other(flat: Tensor) -> list[Tensor]:
    return [flat[:24].view(6, 4), flat[24:40].view(4, 4)]


def columns(flat: Tensor) -> list[Tensor]:
    return [flat.view(8, 5)[:, :3], flat.view(8, 5)[:, 3:]]


def of(views: Callable[[Tensor], list[Tensor]]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(view) for view in views(numbers((40,), 1))]


@by_case
@pytest.mark.parametrize("views", [the_same, overlapping, interleaved], ids=lambda views: views.__name__)
def test_parameters_that_share_elements_are_refused(case: Case, views) -> None:
    with pytest.raises(
        ValueError, match=r"\[0\]\[0\]' of shape .* and 'param_groups\[0\]\[1\]' of shape.*share memory"
    ):
        wrapped(case, of(views))
    first, second = of(views)
    dense = {"params": [second], "policy": None, "preconditioner": None}
    with pytest.raises(ValueError, match="share memory"):
        wrapped(case, [{"params": [first]}, dict(dense)])
    wrapped(case, [{**dense, "params": [first]}, dense])  # both are left to the base


@by_case
@pytest.mark.parametrize("views", [one_beside_the_other, columns], ids=lambda views: views.__name__)
def test_views_without_a_common_element_are_stepped_as_by_the_base(case: Case, views) -> None:
    bare, ours = pair(case, lambda: of(views))
    for opt in (bare, ours):
        train(opt, 0, 5)
    assert_close(values(ours), values(bare))


@by_case
def test_memory_that_is_shared_later_is_refused_before_anything_moves(case: Case) -> None:
    opt = wrapped(case, of(one_beside_the_other))
    train(opt, 0, 2)
    first, second = members(opt)
    second.data = first.data[:4]
    before = values(opt)
    with pytest.raises(ValueError, match="share memory"):
        train(opt, 2, 3)
    assert_same(values(opt), before)
    second.data = second.data.clone()
    train(opt, 2, 4)


def test_without_that_delta_capture_would_step_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selective.plan.groups.check_sharing", lambda *ignored: None)
    still = SelectiveUpdate(base_of(of(the_same)), policy="RandomMask", capture="delta")
    still.policy_groups[0].policy = type(still.policy)(probability=1e-9)  # nothing is selected: nothing may move ...
    before = values(still)
    for p in members(still):
        p.grad = torch.ones_like(p)
    still.param_groups[0]["weight_decay"] = 0.0
    still.step()
    assert (values(still)[0] > before[0] + 0.005).all()  # ... and everything climbs


def test_the_exact_comparison_against_sets_of_addresses() -> None:
    flat = torch.zeros(60)
    made = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=made))

    def addresses(x: Tensor) -> set[int]:
        offsets = torch.arange(60).as_strided(x.shape, x.stride(), x.storage_offset())
        return set(offsets.reshape(-1).tolist())

    found = set()
    for _ in range(200):
        pair = [flat.as_strided((draw(1, 4), draw(1, 4)), (draw(1, 9), draw(1, 4)), draw(0, 20)) for _ in range(2)]
        expected = bool(addresses(pair[0]) & addresses(pair[1]))
        assert _have_one_in_common(*pair) == expected
        found.add(expected)
    assert found == {False, True}


def test_rotations_are_of_the_parameter_as_it_is_now() -> None:
    """A vector becomes a matrix, and a matrix a vector."""
    bare = base_of(parameters())
    ours = SelectiveUpdate(base_of(parameters()), policy=ONES, preconditioner=STILL)
    for opt in (bare, ours):
        train(opt, 0, 3)
        for p, shape in zip(members(opt), ((24,), (3, 2)), strict=True):
            p.data = p.data.reshape(shape)
            for key in ("exp_avg", "exp_avg_sq"):
                opt.state[p][key] = opt.state[p][key].reshape(shape)
        train(opt, 3, 6)
    assert_close(values(ours), values(bare))
    matrix, vector = members(ours)[1], members(ours)[0]
    assert BASIS_STEPS in ours.state[matrix] and BASIS_STEPS not in ours.state[vector]
