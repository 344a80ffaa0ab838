"""The option `graph`: what is refused, where it goes, and that a CPU says nothing of it."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from selective import ChainedOptimizer, SelectiveUpdate
from selective.plan.options import Options


def stepped(**options: Any) -> SelectiveUpdate:
    model = nn.Linear(4, 3)
    optimizer = SelectiveUpdate(AdamW(model.parameters(), lr=0.1), policy="Cautious", **options)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("value", [True, None, "always", 0, "False"])
def test_other_values_are_refused_in_words(value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"graph is {value!r}, must be 'auto' or False")):
        SelectiveUpdate(AdamW(nn.Linear(2, 2).parameters()), policy="MGUP", graph=value)


def test_every_way_to_make_an_optimizer_passes_it() -> None:
    model = nn.Linear(4, 3)
    whole = SelectiveUpdate.for_model(model, "adamw", lr=0.1, policy="MGUP", graph=False)
    bound = SelectiveUpdate.bind(AdamW, policy="MGUP", graph=False)(model.parameters(), lr=0.1)
    chain = ChainedOptimizer([bound])
    members = [one for one in (whole, bound, *chain.members) if isinstance(one, SelectiveUpdate)]
    assert len(members) == 3
    assert all(one.options.graph is False for one in members)
    assert stepped().options.graph == "auto"


def test_copies_have_it_and_checkpoints_do_not() -> None:
    optimizer = stepped(graph=False)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.options.graph is False
    assert repr(optimizer.state_dict()) == repr(stepped_as(optimizer).state_dict())


def stepped_as(optimizer: SelectiveUpdate) -> SelectiveUpdate:
    """Another optimizer with graphs, and with this one's checkpoint."""
    other = stepped(graph="auto")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other


def test_it_is_given_at_construction() -> None:
    optimizer = stepped()
    with pytest.raises(AttributeError, match="given at construction"):
        optimizer.graph = False
    with pytest.warns(UserWarning, match="pass graph to SelectiveUpdate: it holds for all groups"):
        SelectiveUpdate(AdamW([{"params": nn.Linear(2, 2).parameters(), "graph": False}]), policy="MGUP")


def test_a_cpu_says_nothing_of_it() -> None:
    assert "launches" not in stepped().explain()
    assert Options().graph == "auto"
