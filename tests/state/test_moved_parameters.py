"""Parameters that are moved to another group in training: what of their state goes along, and what is refused."""

from __future__ import annotations

import copy
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from selective import AdaDiag, Cautious, Dense, Magma, SelectiveUpdate, Soap
from selective.state.entries import POLICY, SEED, STEP, encode_model

GROUPS: dict[str, dict[str, Any]] = {
    "magma": {"policy": Magma()},
    "cautious": {"policy": Cautious()},
    "dense": {"policy": None},
    "rotated": {"policy": None, "preconditioner": Soap()},
    "magma, rotated": {"policy": Magma(), "preconditioner": Soap()},
    "rotated otherwise": {"policy": Cautious(), "preconditioner": AdaDiag()},
}
IN_A_SPACE = {"rotated": "two sides", "magma, rotated": "two sides", "rotated otherwise": "one side"}


def built(first: str, second: str, **options: Any) -> SelectiveUpdate:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(4, 5, generator=generator)) for _ in range(3)]
    groups = [{"params": params[:2], **GROUPS[first]}, {"params": params[2:], **GROUPS[second]}]
    return SelectiveUpdate(torch.optim.AdamW(groups, lr=0.1), policy=None, **options)


def train(optimizer: SelectiveUpdate, numbers: range) -> None:
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for p in params_of(optimizer):
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def params_of(optimizer: SelectiveUpdate) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def move(optimizer: SelectiveUpdate) -> Tensor:
    p = optimizer.param_groups[0]["params"].pop()
    optimizer.param_groups[1]["params"].append(p)
    return p


def loaded(first: str, second: str, saved: dict[str, Any], like: SelectiveUpdate, **options: Any) -> SelectiveUpdate:
    optimizer = built(first, second, **options)
    move(optimizer)
    optimizer.load_state_dict(copy.deepcopy(saved))
    for p, value in zip(params_of(optimizer), params_of(like), strict=True):
        p.data.copy_(value)
    return optimizer


MOVES = [(a, b) for a, b in permutations(GROUPS, 2) if IN_A_SPACE.get(a) in (None, IN_A_SPACE.get(b))]


@pytest.mark.parametrize(
    ("first", "second", "momentum_beta"),
    [(*pair, None) for pair in MOVES if pair[1] != "rotated otherwise"]
    + [("magma", "dense", 0.9), ("dense", "cautious", 0.9)],
)
def test_a_checkpoint_is_loaded_after_a_move(first: str, second: str, momentum_beta: float | None) -> None:
    """... saved at once or a step later, and both runs go on alike."""
    optimizer = built(first, second, momentum_beta=momentum_beta)
    train(optimizer, range(2))
    move(optimizer)
    at_once = loaded(first, second, optimizer.state_dict(), optimizer, momentum_beta=momentum_beta)
    for one in (optimizer, at_once):
        train(one, range(2, 3))
    later = loaded(first, second, optimizer.state_dict(), optimizer, momentum_beta=momentum_beta)
    for one in (optimizer, at_once, later):
        train(one, range(3, 4))
    for one in (at_once, later):
        assert all(torch.equal(p, q) for p, q in zip(params_of(one), params_of(optimizer), strict=True))


def test_a_policy_s_state_goes_before_the_next_step_and_comes_back_fresh() -> None:
    optimizer = built("magma", "dense")
    train(optimizer, range(3))
    p = move(optimizer)
    assert "selective/state/average" in optimizer.state[p]
    train(optimizer, range(3, 4))
    assert not [key for key in optimizer.state[p] if key.startswith("selective/")]
    assert optimizer.param_groups[1]["params"].pop() is p
    optimizer.param_groups[0]["params"].append(p)
    optimizer.state_dict()
    assert optimizer.state[p]["selective/state/average"] == 1.0


def test_a_file_with_what_a_policy_has_left_behind_is_loaded() -> None:
    """As older versions wrote it."""
    optimizer = built("magma", "dense")
    train(optimizer, range(2))
    move(optimizer)
    saved = optimizer.state_dict()
    left = {
        "selective/state/average": torch.tensor(0.5), POLICY: encode_model(Dense()),
        STEP: torch.tensor(2), SEED: torch.tensor(0),
    }  # fmt: skip
    saved["state"][2].update(left)
    other = loaded("magma", "dense", saved, optimizer)
    for one in (optimizer, other):
        train(one, range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(params_of(other), params_of(optimizer), strict=True))
    assert not [key for key in other.state[params_of(other)[2]] if key.startswith("selective/")]
    saved["state"][0]["selective/state/more"] = torch.tensor(0.5)  # where there is a policy, it is refused
    with pytest.raises(ValueError, match="does not fit Magma"):
        other.load_state_dict(saved)


@pytest.mark.parametrize(("first", "second"), sorted({*permutations(GROUPS, 2)} - {*MOVES}))
def test_moments_of_a_rotated_space_are_not_taken_out_of_it(first: str, second: str) -> None:
    optimizer = built(first, second)
    train(optimizer, range(2))
    p = move(optimizer)
    before = [q.detach().clone() for q in params_of(optimizer)]
    for act in (lambda: train(optimizer, range(2, 3)), optimizer.state_dict):
        with pytest.raises(ValueError, match=r"'param_groups\[1\]\[1\]' has moments in the space of a precond"):
            act()
    assert all(torch.equal(q, value) for q, value in zip(params_of(optimizer), before, strict=True))
    del optimizer.state[p]
    train(optimizer, range(2, 4))
    assert float(optimizer.base.state[p]["step"]) in (1.0, 2.0)  # Soap's first step collects only


def test_a_group_that_is_added_takes_no_moments_of_another_space() -> None:
    optimizer = built("rotated", "dense")
    train(optimizer, range(3))
    moved = optimizer.param_groups[0]["params"].pop()
    optimizer.add_param_group({"params": [moved], "preconditioner": AdaDiag()})
    before = [p.clone() for p in params_of(optimizer)]
    with pytest.raises(ValueError, match="in the space of a preconditioner"):
        train(optimizer, range(3, 4))
    assert all(map(torch.equal, before, params_of(optimizer)))
    del optimizer.state[moved]
    train(optimizer, range(3, 5))


def test_a_group_that_is_added_and_loaded_goes_on() -> None:
    """Groups that are added before a load are those of the file."""
    optimizers = [built("rotated", "dense") for _ in range(2)]
    for optimizer in optimizers:
        train(optimizer, range(1))
        extra = torch.nn.Parameter(torch.ones(4, 5))
        optimizer.add_param_group({"params": [extra], "preconditioner": AdaDiag(), "policy": Cautious()})
    first, second = optimizers
    train(first, range(1, 4))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for mine, theirs in zip(params_of(second), params_of(first), strict=True):
        mine.data.copy_(theirs)
    for optimizer in optimizers:
        train(optimizer, range(4, 7))
    assert all(map(torch.equal, params_of(first), params_of(second)))
