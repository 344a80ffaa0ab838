"""Our own entries of a checkpoint: checked before anything is loaded; and state that is made before training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from selective import MGUP, Magma, Policy, RandomMask, SelectiveUpdate
from selective.state.entries import POLICY, POLICY_STATE, PREFIX, SEED, STEP

AVERAGE = POLICY_STATE + "average"
BROKEN = [
    (STEP, torch.tensor([1, 2])),
    (STEP, torch.tensor(float("nan"))),
    (STEP, torch.tensor(float("inf"))),
    (STEP, torch.tensor(-5)),
    (STEP, torch.tensor(1.5)),
    (STEP, "x"),
    (SEED, torch.tensor(-5)),
    (POLICY, "Magma"),
    (AVERAGE, None),
    (AVERAGE, torch.tensor(1)),  # an integer: the average would be rounded to 0 in the next step
]


def trained(make, first: int = 0, last: int = 3, prepare=lambda optimizer: None) -> tuple[list, SelectiveUpdate]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(4, 4, generator=generator)) for _ in range(2)]
    optimizer = make(params)
    prepare(optimizer)
    for step in range(first, last):
        generator.manual_seed(step)
        for p in params:
            p.grad = torch.randn(4, 4, generator=generator)
        optimizer.step()
    return [p.detach() for p in params], optimizer


def magma(params: list) -> SelectiveUpdate:
    return SelectiveUpdate(torch.optim.AdamW(params, lr=0.1), policy=Magma())


@pytest.mark.parametrize(("key", "value"), BROKEN, ids=lambda x: str(x))
def test_a_broken_entry_is_refused_before_anything_is_loaded(key: str, value: Any) -> None:
    _, source = trained(magma)
    broken = copy.deepcopy(source.state_dict())
    for entries in broken["state"].values():
        entries[key] = value
    _, target = trained(magma, last=1)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match="SelectiveUpdate"):
        target.load_state_dict(broken)
    torch.testing.assert_close(target.state_dict(), before, rtol=0, atol=0)


def test_our_names_do_not_get_into_the_base() -> None:
    _, optimizer = trained(magma, last=0)
    p = optimizer.param_groups[0]["params"][0]
    with pytest.raises(ValueError, match="belong to SelectiveUpdate"):
        optimizer.state[p][PREFIX + "other"] = torch.tensor(3)
    optimizer.state[p][STEP] = torch.tensor(3)
    assert not optimizer.base.state


def test_groups_added_on_the_base_are_saved_loaded_and_initialised() -> None:
    def two_groups(params: list) -> SelectiveUpdate:
        optimizer = SelectiveUpdate(torch.optim.AdamW(params[:1]), policy=Magma())
        optimizer.base.add_param_group({"params": params[1:]})
        return optimizer

    _, first = trained(two_groups, last=0)
    saved = first.state_dict()
    assert len(saved["param_groups"]) == 2
    _, second = trained(two_groups, last=0)
    second.load_state_dict(saved)
    _, third = trained(two_groups, last=0)
    third.init_state()
    assert all("exp_avg" in entries and AVERAGE in entries for entries in third.state.values())


@pytest.mark.parametrize("options", [{}, {"capture": "scratch"}, {"capture": "delta"}, {"momentum_beta": 0.9}], ids=str)
@pytest.mark.parametrize("dense", [False, True])
def test_state_made_in_advance_changes_nothing(options: dict, dense: bool) -> None:
    """For a base whose rule we know, whatever the capture: no step is counted, dense groups included."""

    def make(params: list) -> SelectiveUpdate:
        groups = [{"params": params[:1]}, {"params": params[1:], **({"policy": None} if dense else {})}]
        return SelectiveUpdate(torch.optim.AdamW(groups, lr=0.1), policy=MGUP(), **options)

    plain, _ = trained(make)
    prepared, _ = trained(make, prepare=SelectiveUpdate.init_state)
    assert all(torch.equal(a, b) for a, b in zip(plain, prepared, strict=True))


@pytest.mark.parametrize("policy", [RandomMask(), Magma()], ids=lambda p: p.kind)
def test_steps_without_any_gradient_are_counted_in_a_checkpoint(policy: Policy) -> None:
    """Nothing of a parameter has state then; random policies draw by the count all the same."""

    def make(params: list) -> SelectiveUpdate:
        return SelectiveUpdate(torch.optim.AdamW(params, lr=0.1), policy=policy)

    def unused(optimizer: SelectiveUpdate) -> None:
        optimizer.step()
        optimizer.step()

    params, _ = trained(make, prepare=unused)
    _, source = trained(make, last=0, prepare=unused)
    resumed, target = trained(make, prepare=lambda optimizer: optimizer.load_state_dict(source.state_dict()))
    assert target.count.steps == 5
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))
