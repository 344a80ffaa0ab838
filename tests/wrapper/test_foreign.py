"""Things that are not this optimizer's: checkpoints of other bases or models, policies switched or in a wrong place."""

from __future__ import annotations

import copy

import pytest
import torch

from selective import MGUP, Cautious, Dense, Fixed, Magma, MeanPreserving, Policy, SelectiveUpdate, TopK


def stepped(optimizer: torch.optim.Optimizer, count: int = 2) -> torch.optim.Optimizer:
    for step in range(count):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    return optimizer


def adamw(policy: object = "MGUP", size: int = 8, **options: object) -> SelectiveUpdate:
    p = torch.nn.Parameter(torch.ones(size, size))
    return SelectiveUpdate(torch.optim.AdamW([p], lr=1e-2, **options), policy=policy)  # type: ignore[arg-type]


def unchanged(optimizer: SelectiveUpdate, state: dict) -> None:
    with pytest.raises(ValueError, match=r"nothing was loaded|construct the optimizer"):
        optimizer.load_state_dict(state)
    assert not optimizer.base.state
    stepped(optimizer)


def test_a_checkpoint_of_another_shape_is_refused() -> None:
    unchanged(adamw(size=4), stepped(adamw()).state_dict())
    unchanged(adamw(size=4), stepped(adamw()).base.state_dict())  # type: ignore[attr-defined]


def test_a_checkpoint_of_another_base_is_refused() -> None:
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(8, 8))], lr=0.1, momentum=0.9)
    unchanged(SelectiveUpdate(sgd, policy=MGUP()), stepped(adamw()).state_dict())
    other = stepped(torch.optim.SGD([torch.nn.Parameter(torch.ones(8, 8))], lr=0.1, momentum=0.9))
    unchanged(adamw(), other.state_dict())


def test_flags_decide_what_has_to_be_there() -> None:
    state = stepped(adamw(amsgrad=True)).state_dict()
    adamw(amsgrad=True).load_state_dict(state)
    del state["state"][0]["max_exp_avg_sq"]
    unchanged(adamw(amsgrad=True), state)


def test_a_nested_policy_of_another_kind_is_refused() -> None:
    made = Policy(selection=TopK(), strength=Fixed(selected=2.0))
    other = Policy(selection=TopK(), strength=MeanPreserving())
    unchanged(adamw(other), stepped(adamw(made)).state_dict())
    adamw(Policy(selection=TopK(fraction=0.2), strength=Fixed())).load_state_dict(stepped(adamw(made)).state_dict())


def test_a_plain_checkpoint_starts_our_count_again() -> None:
    plain = stepped(adamw(Dense())).state_dict()
    optimizer = stepped(adamw(), 5)
    optimizer.load_state_dict(plain)
    assert int(stepped(optimizer, 1).state_dict()["state"][0]["selective/step"]) == 1


def test_the_policy_is_not_set_on_the_wrapper() -> None:
    optimizer = adamw()
    assert optimizer.policy == MGUP()
    with pytest.raises(AttributeError):
        optimizer.policy = Cautious()  # type: ignore[misc]
    optimizer.policy_groups[0] = Cautious()  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"set opt\.policy_groups\[0\]\.policy"):
        stepped(optimizer)


@pytest.mark.parametrize("new", [Cautious(), Magma(), Dense()], ids=repr)
@pytest.mark.parametrize("old", [MGUP(), Magma(), Dense()], ids=repr)
def test_a_policy_switched_in_mid_run_starts_with_its_own_state(old: Policy, new: Policy) -> None:
    """From there on it is as if the run had been adopted with the new policy."""
    if old.kind == new.kind:
        pytest.skip("not a switch: hyper-parameters change, state stays")
    optimizer = stepped(adamw(old), 3)
    assert isinstance(optimizer, SelectiveUpdate)
    adopted = adamw(new)
    adopted.base.load_state_dict(copy.deepcopy(optimizer.base.state_dict()))  # torch shares the tensors
    adopted.count.steps = optimizer.count.steps  # coins are drawn by the step's number
    with torch.no_grad():
        adopted.param_groups[0]["params"][0].copy_(optimizer.param_groups[0]["params"][0])
    optimizer.policy_groups[0].policy = new
    stepped(optimizer)
    stepped(adopted)
    assert torch.equal(optimizer.param_groups[0]["params"][0], adopted.param_groups[0]["params"][0])
    if not isinstance(new, Dense):
        fresh = adamw(new)
        fresh.load_state_dict(optimizer.state_dict())
