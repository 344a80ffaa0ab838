"""`torch.distributed.checkpoint` through real files: saved, loaded into a run that never stepped, and gone on with.

What get and set do in memory is row 9 of the conformance suite, over all bases and policies. Here is the rest of the
way: `dcp.save` and `dcp.load`, which read into the tensors of the live state, plain and flattened.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from stack_loops import CASES, assert_same, by_hand, differences, net, train, wrap
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning:torch"),
]


class App:
    """Model and optimizer as the tutorials have them: one `Stateful` for both."""

    def __init__(self, model: Any, optimizer: Any, flat: bool) -> None:
        self.model, self.optimizer = model, optimizer
        self.options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer, options=self.options)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.model, self.optimizer, options=self.options,
            model_state_dict=state["model"], optim_state_dict=state["optimizer"],
        )  # fmt: skip


def save(app: App, folder: Path) -> None:
    dcp.save({"app": app}, checkpoint_id=folder, no_dist=True)


def load(app: App, folder: Path) -> None:
    dcp.load({"app": app}, checkpoint_id=folder, no_dist=True)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_from_files_bit_for_bit(case: str, flat: bool, tmp_path: Path) -> None:
    model, optimizer = by_hand(case, 3)
    save(App(model, optimizer, flat), tmp_path)
    assert_same((model, optimizer), by_hand(case, 3))  # saving moved nothing
    fresh = net(1)
    resumed = wrap(fresh, case)  # never stepped
    load(App(fresh, resumed, flat), tmp_path)
    assert_same((fresh, resumed), (model, optimizer))
    train(model, optimizer, range(3, 6))
    train(fresh, resumed, range(3, 6))
    assert_same((fresh, resumed), (model, optimizer))
    assert_same((model, optimizer), by_hand(case, 6))


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("case", CASES)
def test_a_run_is_set_back_to_an_earlier_file(case: str, flat: bool, tmp_path: Path) -> None:
    model, optimizer = by_hand(case, 2)
    save(App(model, optimizer, flat), tmp_path)
    train(model, optimizer, range(2, 5))
    assert differences((model, optimizer), by_hand(case, 2))
    load(App(model, optimizer, flat), tmp_path)
    train(model, optimizer, range(2, 6))
    assert_same((model, optimizer), by_hand(case, 6))


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("case", CASES)
def test_a_run_that_never_stepped_is_saved_and_starts_from_the_file(case: str, flat: bool, tmp_path: Path) -> None:
    model = net()
    start = copy.deepcopy(model)
    optimizer = wrap(model, case)
    save(App(model, optimizer, flat), tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start.parameters(), strict=True))
    fresh = net(1)
    resumed = wrap(fresh, case)
    load(App(fresh, resumed, flat), tmp_path)
    for one, its in ((model, optimizer), (fresh, resumed)):
        train(one, its, range(4))
    assert_same((fresh, resumed), (model, optimizer))
    # torch makes state by a step without a gradient; nothing of ours was counted in it
    entries = optimizer.state_dict()["state"].values()
    assert {int(entry["selective/step"]) for entry in entries if "selective/step" in entry} <= {4}
