"""Any partition of parameters into members of any kind: steps as apart, and goes on from a checkpoint."""

from __future__ import annotations

import copy
from typing import Any

import torch
from chains import equal, give_gradients, train, values
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from selective import ChainedOptimizer, SelectiveUpdate

SHAPES = [(4, 3), (5,), (2, 2, 2), (1,), (3, 4), (6,)]
POLICIES = [None, "MGUP", "Cautious", "Grams"]
member_kinds = st.tuples(st.sampled_from(["bare", *POLICIES]), st.booleans(), st.sampled_from([0.01, 0.02]))
layouts = st.tuples(
    st.lists(st.integers(0, 2), min_size=len(SHAPES), max_size=len(SHAPES)),
    st.lists(member_kinds, min_size=3, max_size=3),
)


def model_of() -> nn.ParameterList:
    generator = torch.Generator().manual_seed(0)
    return nn.ParameterList(torch.randn(shape, generator=generator) for shape in SHAPES)


def members(model: nn.ParameterList, layout: Any) -> list[Optimizer]:
    """The members of a layout: for each parameter the number of its member, and for each member what it is."""
    owners, kinds = layout
    optimizers: list[Optimizer] = []
    for number, (policy, is_sgd, rate) in enumerate(kinds):
        params = [p for p, owner in zip(model, owners, strict=True) if owner == number]
        if params:
            base = SGD(params, lr=rate, momentum=0.9) if is_sgd else AdamW(params, lr=rate)
            optimizers.append(base if policy == "bare" else SelectiveUpdate(base, policy=policy))
    return optimizers


@given(layout=layouts, saved_at=st.integers(0, 2))
@settings(max_examples=15)
def test_a_chain_steps_as_its_members_and_resumes(layout: Any, saved_at: int) -> None:
    model, alone = model_of(), model_of()
    opt, apart = ChainedOptimizer(members(model, layout)), members(alone, layout)
    resumed_model, resumed = model, opt
    for step in range(3):
        if step == saved_at:
            resumed_model = copy.deepcopy(model)
            resumed = ChainedOptimizer(members(resumed_model, layout))
            resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
        train(model, opt, [step])
        if resumed is not opt:
            train(resumed_model, resumed, [step])
        give_gradients(alone, step)
        for member in apart:
            member.step()
        assert equal(values(model), values(alone)), step
        assert equal(values(model), values(resumed_model)), step
    owned = [p for group in opt.param_groups for p in group["params"]]
    assert {id(p) for p in owned} == {id(p) for p in model} and len(owned) == len(SHAPES)
