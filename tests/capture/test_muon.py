"""torch's Muon as a known rule: its momentum bit for bit, its update no further from float64, its checkpoints."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from muon_problems import (
    DECAY,
    RATE,
    MuonOnes,
    MuonOnesInPython,
    bare,
    give_grads,
    make_params,
    momenta,
    same,
    way_of,
    wrapped,
)
from torch.optim import Muon

from selective import MGUP, Dense, SelectiveUpdate, base_part
from selective.kernels.reference import newton_schulz_ as exactly

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no nesterov": {"nesterov": False},
    "rms": {"adjust_lr_fn": "match_rms_adamw", "momentum": 0.8},
    "three steps": {"ns_steps": 3, "ns_coefficients": (1.875, -1.25, 0.375), "eps": 1e-3},
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CASES = [(name, torch.float32) for name in OPTIONS] + [("default", dtype) for dtype in DTYPES[1:]]


def wanted_update(optimizer: Muon, p: torch.nn.Parameter) -> torch.Tensor:
    """The rule in float64, from the state before the step: the update times the matrix's learning rate."""
    assert p.grad is not None
    group, state, grad = optimizer.param_groups[0], optimizer.state.get(p, {}), p.grad.double()
    momentum = state["momentum_buffer"].double() if state else torch.zeros_like(grad)
    momentum = momentum.lerp(grad, 1 - group["momentum"])
    direction = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
    rows, columns = p.shape
    ratio = 0.2 * max(rows, columns) ** 0.5 if group["adjust_lr_fn"] else max(1.0, rows / columns) ** 0.5
    numbers = {"steps": group["ns_steps"], "coefficients": group["ns_coefficients"], "eps": group["eps"]}
    exactly([direction[None]], [group["lr"] * ratio], **numbers)
    return direction


@pytest.mark.parametrize("name,dtype", CASES, ids=str)
def test_the_momentum_is_torchs_bit_for_bit_and_the_step_no_further_off(name: str, dtype: torch.dtype) -> None:
    """Over 9 steps, each from torch's weights. Checkpoints are exchanged after every third step, both ways."""
    theirs, ours = make_params(dtype), make_params(dtype)
    torchs, optimizer = bare(theirs, **OPTIONS[name]), wrapped(ours, **OPTIONS[name])
    assert way_of(optimizer) == "fused"
    off = {"torch": 0.0, "ours": 0.0}
    for step in range(9):
        before = [p.detach().double() for p in theirs]
        give_grads(theirs, step)
        give_grads(ours, step)
        with torch.no_grad():
            for p, q in zip(ours, theirs, strict=True):
                p.copy_(q)
        updates = [wanted_update(torchs, p) for p in theirs]
        torchs.step()
        optimizer.step()
        same(momenta(torchs), momenta(optimizer))
        assert [m.dtype for m in momenta(optimizer)] == [dtype] * len(ours)
        for start, update, p, q in zip(before, updates, theirs, ours, strict=True):
            wanted = start * (1 - RATE * DECAY) - update
            off["torch"] += float((p.detach().double() - wanted).square().sum())
            off["ours"] += float((q.detach().double() - wanted).square().sum())
        if step % 3 == 2:
            from_torch, from_ours = copy.deepcopy(torchs.state_dict()), copy.deepcopy(optimizer.state_dict())
            torchs.load_state_dict(base_part(from_ours))
            optimizer.load_state_dict(from_torch)
    # Two sums of some 6,000 squares of roundings, which differ by some 2 %.
    assert off["ours"] ** 0.5 <= 1.05 * off["torch"] ** 0.5


WRAPS: dict[str, dict[str, Any]] = {
    "ones": {"policy": MuonOnes()},
    "own code": {"policy": MuonOnesInPython()},
    "dense, asked for": {"policy": Dense(), "wrap": {"capture": "fused"}},
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_ones_in_every_form_take_the_same_step(wrap: str) -> None:
    """The own code of a policy rounds as the kernels do; and a run that is resumed in the middle has the same bits."""
    first, other, again = make_params(), make_params(), make_params()
    plain, optimizer = wrapped(first), wrapped(other, **WRAPS[wrap])
    assert way_of(optimizer) == "fused"
    for step in range(4):
        for params, one in ((first, plain), (other, optimizer)):
            give_grads(params, step)
            one.step()
        if step == 1:
            state, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in other]
    for p, q in zip(first, other, strict=True):
        # multiply-adds may be fused in one and not in the other: two roundings of weights below 4 in a step
        torch.testing.assert_close(p, q, rtol=0, atol=4 * 2 * 4 * 2.0**-24)
    resumed = wrapped(again, **WRAPS[wrap])
    with torch.no_grad():
        for p, value in zip(again, weights, strict=True):
            p.copy_(value)
    resumed.load_state_dict(state)
    for step in (2, 3):
        give_grads(again, step)
        resumed.step()
    same(other, again)
    same(momenta(optimizer), momenta(resumed))


@pytest.mark.parametrize("options", [{}, {"capture": "scratch"}, {"capture": "delta"}], ids=str)
def test_dense_is_the_bases_own_step(options: dict[str, Any]) -> None:
    theirs, ours = make_params(), make_params()
    torchs, optimizer = bare(theirs), wrapped(ours, Dense(), wrap=options)
    for step in range(3):
        give_grads(theirs, step)
        give_grads(ours, step)
        torchs.step()
        optimizer.step()
    same(theirs, ours)
    assert way_of(optimizer) == "dense"
    assert "the step is handed to the base" in optimizer.explain()


@pytest.mark.parametrize("capture", ["scratch", "delta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpoints_go_to_other_captures_and_back(capture: str, dtype: torch.dtype) -> None:
    """Delta capture of low precision keeps a float32 momentum, which ours goes on with."""
    params = make_params(dtype)
    one, other = wrapped(params), wrapped(params, wrap={"capture": capture})
    for step, (now, then) in enumerate([(one, other), (other, one), (one, other)]):
        give_grads(params, step)
        now.step()
        then.load_state_dict(copy.deepcopy(now.state_dict()))
        same([m.float() for m in momenta(now)], [m.float() for m in momenta(then)])
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("policy", [None, MGUP()], ids=str)
def test_a_checkpoint_of_a_dense_run_by_our_rule_goes_everywhere(policy: Any) -> None:
    """To and from a dense run by the base, and into a masked one; and it says in explain() what it is."""
    params = make_params()
    ours = SelectiveUpdate(bare(params), policy=None, capture="fused")
    other = SelectiveUpdate(bare(params), policy=policy)
    assert "fused: asked for: the rule of Muon runs on the base's own state, with Newton-Schulz" in ours.explain()
    give_grads(params, 0)
    ours.step()
    saved = copy.deepcopy(ours.state_dict())
    other.load_state_dict(saved if policy is None else base_part(saved))
    same(momenta(ours), momenta(other))
    give_grads(params, 1)
    other.step()
    if policy is None:
        ours.load_state_dict(copy.deepcopy(other.state_dict()))
        same(momenta(ours), momenta(other))


def test_copies_and_pickles_step_as_the_original() -> None:
    params = make_params()
    optimizer = wrapped(params, "MGUP")
    give_grads(params, 0)
    optimizer.step()
    others = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    for one in (optimizer, *others):
        members = one.param_groups[0]["params"]
        give_grads(members, 1)
        one.step()
        assert way_of(one) == "fused"
        same(params, members)
        same(momenta(optimizer), momenta(one))


def test_masks_change_from_step_to_step_and_a_switch_to_dense_goes_on_as_torch() -> None:
    params = make_params()
    optimizer = wrapped(params, "MGUP")
    for step in range(2):
        give_grads(params, step)
        optimizer.step()
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in params]
    torchs = bare(theirs)
    torchs.load_state_dict(base_part(copy.deepcopy(optimizer.state_dict())))
    optimizer.policy_groups[0].policy = Dense()
    for step in range(2, 4):
        for some, one in ((params, optimizer), (theirs, torchs)):
            give_grads(some, step)
            one.step()
    assert way_of(optimizer) == "dense"
    same(params, theirs)
