"""The optimizer is a face over parts: it inherits from torch's `Optimizer` alone, and keeps nothing that changes."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from typing import Any

import torch
from state_cases import numbers, parameters
from torch.optim import Optimizer

from selective import MGUP, Cautious, SelectiveUpdate, Soap


def make() -> SelectiveUpdate:
    return SelectiveUpdate(torch.optim.AdamW(parameters()), policy=MGUP(), preconditioner=Soap(refresh_every=2))


def step(opt: SelectiveUpdate) -> None:
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = numbers(p.shape, 5)
    opt.step()


def use(opt: SelectiveUpdate) -> None:
    """Everything that changes an optimizer."""
    step(opt)
    saved = copy.deepcopy(opt.state_dict())
    opt.policy_groups[0].policy = Cautious()
    step(opt)
    opt.policy_groups[0].policy = MGUP()
    opt.load_state_dict(saved)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    opt.init_state()
    opt.state = defaultdict(dict)
    step(opt)
    opt.param_groups[0]["params"].pop()
    opt.explain(), opt.statistics(), pickle.dumps(opt)


def test_it_inherits_from_torch_alone() -> None:
    assert SelectiveUpdate.__mro__ == (SelectiveUpdate, Optimizer, object)


def test_what_changes_is_inside_of_its_parts() -> None:
    """So that an object which has copied its attributes shares all of it."""
    opt = make()
    before: dict[str, Any] = dict(vars(opt))
    use(opt)
    after = vars(opt)
    assert after.keys() == before.keys()
    assert [name for name, value in before.items() if after[name] is not value] == []
