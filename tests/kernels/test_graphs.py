"""Launches of a plan are recorded, replayed or made one by one, and replays read what has changed.

What is recorded here are lists of launches with their arguments, on the CPU: as in a CUDA graph, a replay repeats the
numbers and addresses that a launch was handed, and only tables in memory can bring new ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from gpu_support import F32, assert_equal_items, copied, few_samples, made
from recorded_launches import ListRecorder
from step_cases import KINDS, RULES
from torch import Tensor

from selective.kernels import Draw, ItemList, Selection, Strength
from selective.kernels.gpu.batches import Plan
from selective.kernels.gpu.graphs import WARM, Budget, RepeatedLaunches, Sums
from selective.kernels.gpu.plan import prepared
from selective.kernels.graph_switch import SWITCH
from selective.kernels.spec import StepCall, StepSpec

CPU = torch.device("cpu")


class Launches:
    """Launches that only count how often they are made."""

    def __init__(self, nbytes: int = 1000) -> None:
        self.count, self.nbytes = 0, nbytes

    def __call__(self) -> tuple[Sums, int]:
        self.count += 1
        return [torch.tensor(float(self.count)), None], self.nbytes


def repeated(recorder: ListRecorder | None, nbytes: int = 1000, **options: Any) -> tuple[Launches, RepeatedLaunches]:
    launches = Launches(nbytes)
    options.setdefault("budget", Budget())
    return launches, RepeatedLaunches(launches, CPU, recorder, **options)


def step(launches: RepeatedLaunches, times: int = 1, wanted: bool = True) -> Sums:
    sums: Sums = []
    for _ in range(times):
        sums = launches(wanted)
    return sums


def test_they_are_recorded_once_all_is_compiled_and_replayed_from_then_on() -> None:
    recorder, budget = ListRecorder(), Budget()
    launches, steps = repeated(recorder, budget=budget)
    step(steps, WARM)
    assert (launches.count, recorder.recordings) == (WARM, [])
    assert "until 2 steps" in str(steps.describe())
    sums = step(steps, 3)
    (recording,) = recorder.recordings
    assert (launches.count, recording.replays) == (WARM + 1, 3)  # it was called once more, to be recorded
    assert recording.nbytes == 1000
    assert (budget.nbytes(), budget.nbytes(CPU), budget.nbytes(torch.device("meta"))) == (1000, 1000, 0)
    assert steps.describe() == "replayed as a CUDA graph"
    assert sums[1] is None
    assert sums[0] is not step(steps)[0]  # each step has sums of its own


def test_a_step_that_compiled_something_does_not_count() -> None:
    recorder = ListRecorder()

    class Compiling(Launches):
        def __call__(self) -> tuple[Sums, int]:
            recorder.compiled += self.count in (0, 1, 3)
            return super().__call__()

    steps = RepeatedLaunches(Compiling(), CPU, recorder, Budget())
    step(steps, 4 + WARM)
    assert not recorder.recordings
    step(steps)
    assert len(recorder.recordings) == 1


@pytest.mark.parametrize("why", ["a CPU", "not wanted", "the environment"])
def test_they_are_never_recorded(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "the environment":
        monkeypatch.setenv(SWITCH, "0")
    recorder = None if why == "a CPU" else ListRecorder()
    launches, steps = repeated(recorder)
    step(steps, 6, wanted=why != "not wanted")
    assert launches.count == 6
    assert recorder is None or not recorder.recordings
    said = steps.describe()
    if why == "a CPU":
        assert said is None
    if why == "not wanted":
        assert "have graph=False" in str(said)
    if why == "the environment":
        assert said == "made one by one, because the environment says SELECTIVE_GRAPH=0"


def test_launch_hooks_get_their_launches_and_the_graph_is_kept() -> None:
    recorder = ListRecorder()
    launches, steps = repeated(recorder)
    step(steps, WARM + 1)
    before, settings, recorder.now = launches.count, recorder.now, None
    step(steps, 2)
    assert launches.count == before + 2
    recorder.now = settings
    step(steps, 2)
    assert (launches.count, len(recorder.recordings)) == (before + 2, 1)


def test_other_settings_are_recorded_anew() -> None:
    recorder = ListRecorder()
    launches, steps = repeated(recorder)
    step(steps, WARM + 2)
    before, recorder.now = launches.count, ("others",)
    step(steps, WARM)
    assert (launches.count, len(recorder.recordings)) == (before + WARM, 1)
    step(steps, 2)
    assert [recording.replays for recording in recorder.recordings] == [2, 2]


def test_a_users_capture_gets_its_own_launches_and_the_tables() -> None:
    """Nothing is destroyed inside of it. Later steps start again."""
    recorder, budget = ListRecorder(), Budget(most=1)
    launches, steps = repeated(recorder, budget=budget)
    step(steps, WARM + 1)
    recorder.capturing = True
    before = launches.count
    step(steps, 2)
    assert launches.count == before + 2
    recording = weakref.ref(recorder.recordings.pop())
    assert recording() is not None  # it was set aside
    recorder.capturing = False
    step(steps, WARM)
    assert recording() is None
    assert launches.count == before + 2 + WARM
    step(steps)
    assert [recording.replays for recording in recorder.recordings] == [1]


@pytest.mark.parametrize("capturing", [True, False])
def test_a_plan_that_goes_during_a_users_capture_destroys_nothing_there(capturing: bool) -> None:
    recorder = ListRecorder()
    _, steps = repeated(recorder)
    step(steps, WARM + 1)
    recording = weakref.ref(recorder.recordings.pop())
    recorder.capturing = capturing
    del steps
    assert (recording() is not None) == capturing
    recorder.capturing = False
    step(repeated(recorder)[1])
    assert recording() is None


def test_so_many_graphs_are_recorded_in_a_process() -> None:
    """Failures count, too: torch keeps memory of each."""
    budget, recorder = Budget(most_recorded=2), ListRecorder()
    recorder.failure = RuntimeError("no")
    step(repeated(recorder, budget=budget)[1], WARM + 1)
    recorder.failure = None
    for said in (
        "replayed as a CUDA graph",
        "made one by one, because 2 graphs have been recorded on cpu, as many as ",
    ):
        _, steps = repeated(recorder, budget=budget)
        step(steps, WARM + 1)
        description = steps.describe()
        assert description is not None
        assert description.startswith(said)


def test_where_recording_fails_the_step_is_taken_all_the_same() -> None:
    recorder = ListRecorder()
    recorder.failure = RuntimeError("CUDA error: operation not permitted\nmore about it")
    launches, steps = repeated(recorder)
    step(steps, WARM + 3)
    assert launches.count == WARM + 3
    assert steps.describe() == ("made one by one, because recording them failed (CUDA error: operation not permitted)")


def test_a_mistake_of_ours_is_not_hidden() -> None:
    recorder = ListRecorder()
    recorder.failure = AssertionError("a mistake")
    _, steps = repeated(recorder)
    step(steps, WARM)
    with pytest.raises(AssertionError, match="a mistake"):
        step(steps)


def test_number_and_memory_of_graphs_are_bounded() -> None:
    budget, all_steps = Budget(most=2, most_bytes=50 << 20), []
    for mib, more in ((20, 0), (40, 0), (20, 20), (30, 0), (1, 0)):
        launches, steps = repeated(ListRecorder(more << 20), mib << 20, budget=budget)
        step(steps, WARM + 2)
        all_steps.append((steps, launches.count))
    too_large = (
        "made one by one, because a graph would keep 40 MiB beside the 20 MiB of other graphs, and graphs may keep 50 "
        "MiB on a device"
    )
    assert [steps.describe() for steps, _ in all_steps] == [
        "replayed as a CUDA graph",
        too_large,
        too_large,
        "replayed as a CUDA graph",
        "made one by one, because there are 2 graphs on cpu already, as many as there may be",
    ]
    assert [count for _, count in all_steps] == [WARM + 1, WARM + 2, WARM + 3, WARM + 1, WARM + 2]
    del all_steps[0], steps
    _, steps = repeated(ListRecorder(), 10, budget=budget)
    step(steps, WARM + 1)
    assert steps.describe() == "replayed as a CUDA graph"


def test_a_benchmark_may_record_a_graph_for_each_of_its_optimizers() -> None:
    """Afterwards the limits are what they were."""
    budget = Budget(most=1, most_bytes=10 << 20, most_recorded=1)
    with budget.unlimited():
        for _ in range(3):
            _, steps = repeated(ListRecorder(), 20 << 20, budget=budget)
            step(steps, WARM + 1)
            assert steps.describe() == "replayed as a CUDA graph"
    assert (budget.most, budget.most_bytes, budget.most_recorded) == (1, 10 << 20, 1)
    _, steps = repeated(ListRecorder(), budget=budget)
    step(steps, WARM + 1)
    description = steps.describe()
    assert description is not None
    assert description.startswith("made one by one, because 3 graphs have been recorded")


def test_graphs_of_optimizers_that_are_garbage_make_room() -> None:
    budget = Budget(most=1)
    _, steps = repeated(ListRecorder(), budget=budget)
    step(steps, WARM + 1)
    vars(steps)["itself"] = steps  # only a collection finds it
    del steps
    assert len(budget) == 1
    _, other = repeated(ListRecorder(), budget=budget)
    step(other, WARM + 1)
    assert other.describe() == "replayed as a CUDA graph"


# Plans: two groups with numbers of their own, whose tables are brought up to date before each replay.


@pytest.fixture(autouse=True)
def _quiet_numpy() -> Iterator[None]:
    with numpy.errstate(all="ignore"):
        yield


def lists_of(rule: Any, sizes: tuple[tuple[int, ...], ...]) -> list[ItemList]:
    lists, address = [], 0
    for group in sizes:
        items = ItemList()
        for numel in group:
            items.append(copied(made(rule, (numel,), (F32, F32, F32), seed=2 * address + 1, address=address)))
            address += 1
        lists.append(items)
    return lists


def calls_of(lists: list[ItemList], rule: Any, case: tuple[Selection, Strength], number: int) -> list[StepCall]:
    """The calls of a step. Every number that a schedule may move is another one in each step."""
    calls = []
    for group, items in enumerate(lists):
        x = 0.1 + 0.2 * group + 0.1 * number
        selection = replace(case[0], fraction=x, probability=x)
        strength = replace(case[1], selected=1 + x, rest=1 - x, cap=1 + x, temperature=x, smoothing=x)
        how = StepSpec(replace(rule, lr=0.01 * (1 + number)), selection, strength, Draw(3 + group, number), True)
        calls.append(StepCall(items, how, graphs=True))
    return calls


def new_gradients(lists: list[ItemList], number: int, memory: list[Tensor]) -> None:
    """Gradients at other addresses; the memory of those before is kept, so that it can't be taken again."""
    generator = torch.Generator().manual_seed(number)
    for item in (item for items in lists for item in items):
        memory.append(item.grad)
        item.grad = torch.randn(item.grad.shape, generator=generator)


def assert_replays_are_steps(
    rule: Any, case: tuple[Selection, Strength], sizes: Any, spoil: Callable[[Plan], None] | None = None
) -> None:
    recorder, memory, steps = ListRecorder(), [], WARM + 2
    ours, theirs = lists_of(rule, sizes), lists_of(rule, sizes)
    for lists in (ours, theirs):
        for call in calls_of(lists, rule, case, 0):
            assert not any(prepared(call.items, call.spec)[2])  # it makes what the state of the policy lacks
    items = sum(map(len, ours))
    plan = Plan(calls_of(ours, rule, case, 0), [False] * items, lambda device: recorder)
    eager = Plan(calls_of(theirs, rule, case, 0), [False] * items)
    if spoil is not None:
        spoil(plan)
    for number in range(steps):
        for lists in (ours, theirs):
            new_gradients(lists, number, memory)
        calls = calls_of(ours, rule, case, number)
        assert number == 0 or plan.fits(calls)
        sums = [list(table or ()) for table in plan.run(calls)]
        assert sums == [list(table or ()) for table in eager.run(calls_of(theirs, rule, case, number))], number
        for mine, other in zip(ours, theirs, strict=True):
            assert_equal_items(mine, other, f"step {number}")
    (recording,) = recorder.recordings
    assert recording.replays == steps - WARM
    assert plan.describe_launches() == ["replayed as a CUDA graph"]


@pytest.mark.parametrize("name", ["agreement", "element"])
def test_replays_are_steps(name: str) -> None:
    assert_replays_are_steps(RULES["adamw"], KINDS[name], ((40,), (7,)))


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["adamw", "lion", "sgd_nesterov", "scratch"])
@pytest.mark.parametrize("name", KINDS)
def test_replays_of_every_kind_are_steps(name: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few_samples(monkeypatch)
    assert_replays_are_steps(RULES[rule], KINDS[name], ((300,), (20,)))


def test_without_the_tables_a_replay_would_step_as_the_step_before() -> None:
    """The twin: gradients and numbers of the first step."""

    def freeze(plan: Plan) -> None:
        for batch in plan.batches:
            updated = iter([batch.update])
            vars(batch)["update"] = lambda *arguments, updated=updated: [update(*arguments) for update in updated]

    with pytest.raises(AssertionError):
        assert_replays_are_steps(RULES["adamw"], KINDS["agreement"], ((40,),), spoil=freeze)
