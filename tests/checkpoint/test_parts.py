"""Saving, loading and putting back, without an optimizer around them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from parts import Parts, give_gradients, parts_of, two_groups

from selective import MGUP, Cautious, SelectiveUpdate, Soap
from selective.base.mismatch import CheckpointMismatch
from selective.checkpoint import pickles
from selective.checkpoint.frame import checked_frame
from selective.checkpoint.load import load
from selective.checkpoint.rollback import rollback
from selective.checkpoint.save import save
from selective.state.store import follow_changes


def used() -> Parts:
    """Parts with state of the base and of ours, after five steps."""
    parts = parts_of(two_groups(), Soap())
    follow_changes(parts.groups, parts.store)
    give_gradients(parts.base)
    parts.base.step()
    parts.store.join_base(parts.groups.plans)
    parts.count.set(steps=5)
    return parts


def test_what_is_saved_is_loaded() -> None:
    checkpoint = copy.deepcopy(save(*used()))
    fresh = parts_of(two_groups(), Soap())
    fresh.count.set(seed=9)
    assert load(checked_frame(checkpoint), *fresh) == []
    assert (fresh.count.steps, fresh.count.seed) == (5, 3)
    again = save(*fresh)
    for index, entries in checkpoint["state"].items():
        assert list(entries) == list(again["state"][index])
        assert all(torch.equal(value, again["state"][index][key]) for key, value in entries.items())


def test_the_base_part_alone_is_loaded() -> None:
    base = two_groups()
    give_gradients(base)
    base.step()
    fresh = parts_of(two_groups())
    load(checked_frame(copy.deepcopy(base.state_dict())), *fresh)
    assert fresh.store.table == {} and len(fresh.base.state) == 2


def change_everything(parts: Parts, error: Exception) -> None:
    parts.base.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    parts.base.param_groups[0]["lr"] = 7.0
    parts.base.state.clear()
    parts.groups.policies[0].policy = Cautious()
    follow_changes(parts.groups, parts.store)
    parts.count.set(steps=1, seed=1)
    parts.store.table = {}
    raise error


def failing(reason: str) -> ValueError:
    return ValueError(f"it failed ({reason})")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (CheckpointMismatch("it is another"), "it is another; nothing was loaded$"),
        (KeyError("x"), r"it failed \(KeyError: 'x'\)"),
        (RuntimeError("SelectiveUpdate: nothing was loaded"), r"it failed \(RuntimeError: nothing was loaded\)"),
    ],
    ids=["mismatch", "foreign", "foreign, by that text"],
)
def test_everything_is_put_back_and_the_error_says_why(error: Exception, says: str) -> None:
    parts = used()
    base, groups, store, count = parts
    before = copy.deepcopy(save(*parts))
    table, plans, policies = store.table, list(groups.plans), list(groups.policies)
    with pytest.raises(ValueError, match=says), rollback(*parts, failing):
        change_everything(parts, error)
    assert (store.table, groups.plans, groups.policies) == (table, plans, policies)
    assert (count.steps, count.seed, base.param_groups[0]["lr"]) == (5, 3, 1e-2)
    assert groups.policies[0].policy == MGUP()
    assert save(*parts)["param_groups"] == before["param_groups"]


def test_a_mismatch_says_that_nothing_was_loaded() -> None:
    assert str(CheckpointMismatch("found")) == "SelectiveUpdate: found; nothing was loaded"
    assert str(CheckpointMismatch("found", "Do that")) == "SelectiveUpdate: found; nothing was loaded. Do that"
    error = CheckpointMismatch("Found", "do that", long=True)
    assert str(error) == "SelectiveUpdate: Found. Nothing was loaded; do that"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_pickle_of_another_version_is_refused_before_it_is_read() -> None:
    """Its classes may have moved since: the refusal must not depend on them."""
    opt = SelectiveUpdate(two_groups(), policy=MGUP())
    pickled = pickle.dumps(opt)
    assert isinstance(pickle.loads(pickled), SelectiveUpdate)
    other = pickled.replace(pickles.__version__.encode(), b"0.0.7")
    moved = other.replace(b"selective.plan.options", b"selective.plan.0ptions")
    for one in (other, moved):
        with pytest.raises(ValueError, match=r"by version 0\.0\.7 .* state_dict\(\)"):
            pickle.loads(one)
    with pytest.raises(ModuleNotFoundError):  # the twin: without the version in front that is all there is to read
        pickle.loads(pickled.replace(b"selective.plan.options", b"selective.plan.0ptions"))


def test_a_state_without_a_version_is_refused() -> None:
    """As copies and pickles were until there was one."""
    opt = SelectiveUpdate(two_groups(), policy=MGUP())
    state = {key: value for key, value in opt.__getstate__().items() if key != "version"}
    with pytest.raises(ValueError, match=r"did not write its number .* state_dict\(\)"):
        SelectiveUpdate.__new__(SelectiveUpdate).__setstate__(state)
