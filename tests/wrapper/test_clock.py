"""The step count on the device: Note [the clock]. Here the device is the CPU, and a graph is played by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import selective.step.begin
import selective.step_count
from selective import MGUP, Dense, RandomMask, SelectiveUpdate
from selective.capture import kernel_calls
from selective.plan.group_params import GroupParams
from selective.state.entries import STEP
from selective.step_count import Clocks, DeviceClock

CPU = torch.device("cpu")


def test_a_clock_counts_in_the_same_memory() -> None:
    clock = DeviceClock(CPU, seed=2**63 - 1, step=3)
    now = clock.now
    clock.tick()
    assert (now.tolist(), clock.expected) == ([2**63 - 1, 4], (2**63 - 1, 4))
    clock.set(5, 7)
    assert clock.now is now
    assert (now.tolist(), now.dtype, clock.read()) == ([5, 7], torch.int64, 7)


def test_the_host_is_right_until_a_step_was_recorded() -> None:
    clocks = Clocks()
    assert clocks.start([CPU], seed=1, step=4) == 4
    clocks.tick([CPU])
    assert clocks.start([CPU], seed=1, step=9) == 9  # a checkpoint was loaded in between
    now = clocks.on(CPU)
    assert now is not None
    assert now.tolist() == [1, 9]
    now[1] = 30
    assert clocks.count(9) == 9
    clocks.start([CPU], seed=1, step=9, recording=True)
    assert clocks.count(9) == 30
    assert clocks.start([CPU], seed=1, step=9) == 30


def test_no_clock_is_made_in_a_graph() -> None:
    with pytest.raises(RuntimeError, match="take one step before capturing"):
        Clocks().start([CPU], seed=0, step=0, recording=True)


def test_without_a_gpu_there_is_no_clock() -> None:
    optimizer = built()
    optimizer.step()
    assert optimizer.count.clocks.on(CPU) is None


def built(capturable: bool | None = None, **options) -> SelectiveUpdate:
    p = torch.nn.Parameter(torch.zeros(4, 4))
    p.grad = torch.ones(4, 4)
    base = torch.optim.SGD([p], lr=0.1, momentum=0.9) if capturable is None else torch.optim.AdamW([p])
    if capturable is not None:
        base.param_groups[0]["capturable"] = capturable
    return SelectiveUpdate(base, **{"policy": RandomMask(), **options})


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch):
    """Steps an optimizer as inside of a graph: nothing runs on the device."""
    flag = {"recording": False}
    monkeypatch.setattr(GroupParams, "cuda_devices", property(lambda self: self.devices))
    for module in (selective.step_count, selective.step.begin):
        monkeypatch.setattr(module, "is_recording", lambda: flag["recording"])
    real = kernel_calls.selective_steps
    monkeypatch.setattr(
        kernel_calls, "selective_steps", lambda calls: [None] * len(calls) if flag["recording"] else real(calls)
    )
    tick = DeviceClock.tick
    monkeypatch.setattr(DeviceClock, "tick", lambda self, recording=False: None if recording else tick(self))

    def record(optimizer: SelectiveUpdate) -> None:
        flag["recording"] = True
        try:
            optimizer.step()
        finally:
            flag["recording"] = False

    return record


def replay(optimizer: SelectiveUpdate) -> None:
    optimizer.count.clocks._clocks[CPU].now[1] += 1


def saved_step(optimizer: SelectiveUpdate) -> int:
    return int(optimizer.state_dict()["state"][0][STEP])


def test_replays_are_counted_in_checkpoints_and_by_later_steps(record) -> None:
    optimizer = built()
    optimizer.step()
    record(optimizer)
    assert saved_step(optimizer) == 1  # recording is no step
    for _ in range(5):
        replay(optimizer)
    assert saved_step(optimizer) == 6
    replay(optimizer)
    (entries,) = optimizer.state.values()
    assert int(entries[STEP]) == 7
    assert copy.deepcopy(optimizer).count.steps == 7
    optimizer.step()
    assert saved_step(optimizer) == 8
    replay(optimizer)
    optimizer.step()
    assert (saved_step(optimizer), optimizer.count.clocks._clocks[CPU].now.tolist()) == (10, [0, 10])


def test_eager_steps_after_replays_draw_the_numbers_of_their_step(record) -> None:
    ours, plain = built(), built()
    for _ in range(4):
        plain.step()
    ours.step()
    record(ours)
    replay(ours)
    replay(ours)  # nothing moves in these, so the parameter is taken over
    ours.step()
    assert ours.count.steps == 4
    a, b = (optimizer.statistics()["param_groups[0][0]"]["share"] for optimizer in (ours, plain))
    assert a == b


def test_a_loaded_checkpoint_sets_the_clock_that_the_graph_reads(record) -> None:
    optimizer = built()
    optimizer.step()
    checkpoint = optimizer.state_dict()
    now = optimizer.count.clocks.on(CPU)
    assert now is not None
    record(optimizer)
    replay(optimizer)
    optimizer.load_state_dict(checkpoint)
    assert now.tolist() == [0, 1]
    replay(optimizer)
    assert saved_step(optimizer) == 2


def test_recorded_items_are_kept_and_not_used_again(record) -> None:
    optimizer = built()
    optimizer.step()
    (plan,) = optimizer.groups.plans
    given = plan.kept._lists[0].items
    record(optimizer)
    assert [one.items for one in plan.kept.recorded] == [given]
    optimizer.step()
    assert plan.kept._lists[0].items is not given
    optimizer.param_groups[0]["params"] = [torch.nn.Parameter(torch.zeros(2))]
    optimizer.explain()
    assert optimizer.groups.recorded[0].items is given  # a graph of the old group may still be replayed


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"capturable": False}, "capturable is False"),
        ({"capturable": False, "policy": Dense()}, "capturable is False"),
        ({"on_nonfinite": "skip"}, "on_nonfinite"),
    ],
    ids=str,
)
def test_what_replays_would_not_repeat_is_refused(options: dict, says: str, record) -> None:
    optimizer = built(**options)
    before = optimizer.param_groups[0]["params"][0].clone()
    with pytest.raises(RuntimeError, match=says):
        record(optimizer)
    assert torch.equal(before, optimizer.param_groups[0]["params"][0])


def test_the_first_step_can_not_be_recorded(record) -> None:
    with pytest.raises(RuntimeError, match="take one step before capturing"):
        record(built())


def test_the_kernel_gets_the_clock_of_its_device(record, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = []

    def watched(calls: Any) -> list[None]:
        draws.extend(call.spec.draw for call in calls)
        return [None] * len(calls)

    monkeypatch.setattr(kernel_calls, "selective_steps", watched)
    optimizer = built(policy=MGUP(), statistics=False)
    optimizer.step()
    optimizer.step()
    clock = optimizer.count.clocks.on(CPU)
    assert clock is not None
    assert [draw.clock is clock for draw in draws] == [True, True]
    assert clock.tolist() == [0, 2]
