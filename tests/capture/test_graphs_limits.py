"""CUDA graphs of a step's own beside what users do: streams, threads, hooks, copies, captures of theirs, failures."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from graph_twins import (
    DEVICE,
    REPLAYED,
    assert_equal_runs,
    assert_same,
    give_grads,
    make_params,
    run,
    schedule,
    take_step,
    wrapped,
)
from torch.optim import AdamW

from selective import MGUP, Cautious, ChainedOptimizer, SelectiveUpdate

pytestmark = pytest.mark.gpu


def nothing(params: Any, optimizer: SelectiveUpdate, number: int) -> None: ...


def warm(optimizer: SelectiveUpdate, params: Any, steps: int = 6) -> None:
    memory: list[Any] = []
    for number in range(steps):
        give_grads(params, number, memory)
        optimizer.step()


@contextmanager
def no_host_wait() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("base", ["AdamW", "AdamW, fused", "AdamW, lr on the device"])
@pytest.mark.parametrize("policy", [MGUP(), Cautious()], ids=repr)
def test_the_host_waits_neither_for_a_recording_nor_for_a_replay(policy: Any, base: str) -> None:
    warm(*reversed(wrapped(base, policy)))  # compiles
    params, optimizer = wrapped(base, policy)
    warm(optimizer, params, steps=1)  # makes its clock
    gradients = [[torch.randn_like(p) for p in params] for _ in range(8)]
    with no_host_wait():
        for each in gradients:
            for p, grad in zip(params, each, strict=True):
                p.grad = grad
            optimizer.step()
    assert REPLAYED in optimizer.explain()


def queued(graph: Any, steps: int = 200) -> Any:
    """Steps that the host takes while the device is busy with something else, gradients at new addresses in each."""
    params = make_params(((300, 64), (7,)))
    optimizer = SelectiveUpdate(AdamW(params, lr=1e-2), policy=MGUP(), graph=graph)
    generator = torch.Generator(DEVICE).manual_seed(0)
    warm(optimizer, params)
    gradients = [[torch.randn(p.shape, generator=generator, device=DEVICE) for p in params] for _ in range(steps)]
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    behind = torch.cuda.Event()
    behind.record()
    was_behind = False
    for number, each in enumerate(gradients):
        for p, grad in zip(params, each, strict=True):
            p.grad = grad
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + number)
        optimizer.policy_groups[0]["alpha"] = 1.1 + 0.01 * (number % 50)
        optimizer.step()
        if number == 50:  # about a thousand launches wait at most, and then the host does
            was_behind = not behind.query()
    torch.cuda.synchronize()
    return params, optimizer, was_behind


def test_200_steps_behind_a_long_kernel_read_their_own_numbers_and_gradients() -> None:
    (ours, replayed, was_behind), (theirs, _, _) = queued("auto"), queued(False)
    assert was_behind  # or this test has shown nothing
    assert REPLAYED in replayed.explain()
    assert_same(ours, theirs)


def test_streams_that_take_turns() -> None:
    streams = [torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.current_stream()]
    results = []
    for graph in ("auto", False):
        params, optimizer = wrapped("AdamW", MGUP(), graph=graph)
        memory: list[Any] = []
        for number in range(12):
            before, stream = streams[number % 3 - 1], streams[number % 3]
            stream.wait_stream(before)
            with torch.cuda.stream(stream):
                take_step(params, optimizer, number, schedule, memory)
        torch.cuda.synchronize()
        results.append(params)
    assert_same(*results)


def test_two_optimizers_in_two_threads() -> None:
    wanted = [run(lambda graph, seed=seed: wrapped(params=make_params(seed=seed), graph=graph), schedule, 12)[1][0]
              for seed in range(2)]  # fmt: skip
    results: dict[int, Any] = {}

    def train(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            params, optimizer = wrapped(params=make_params(seed=seed))
            memory: list[Any] = []
            for number in range(12):
                take_step(params, optimizer, number, schedule, memory)
            torch.cuda.current_stream().synchronize()
            results[seed] = params, optimizer.explain()

    threads = [threading.Thread(target=train, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(2):
        params, said = results[seed]
        assert REPLAYED in said
        assert_same(params, wanted[seed])


def test_launch_hooks_see_every_launch() -> None:
    from triton import knobs

    params, optimizer = wrapped("AdamW", Cautious())
    warm(optimizer, params)
    seen: list[str] = []

    def hook(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    optimizer.step()
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        optimizer.step()
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert seen.count("selective_step_kernel") == 1
    count = len(seen)
    optimizer.step()
    assert len(seen) == count


def test_copies_and_pickles_have_no_graph() -> None:
    def change(params: Any, optimizer: SelectiveUpdate, number: int) -> None:
        schedule(params, optimizer, number)
        if number == 6:
            other = copy.deepcopy(optimizer)
            pickle.loads(pickle.dumps(optimizer))
            assert REPLAYED not in other.explain()
            for group in other.param_groups:
                for p in group["params"]:
                    p.grad = torch.ones_like(p)
            other.step()

    assert_equal_runs(lambda graph: wrapped("AdamW", MGUP(), graph=graph), change)


def captured(graph: Any) -> Any:
    """Six steps, a capture of the user's with three replays, six more steps, two more replays, and one more step."""
    params, optimizer = wrapped("AdamW, capturable", MGUP(), graph=graph)
    for p in params:
        p.grad = torch.ones_like(p)
    static = [p.grad for p in params]
    memory: list[Any] = []
    warm(optimizer, params)
    for p, grad in zip(params, static, strict=True):
        p.grad = grad
    torch.cuda.synchronize()
    own = torch.cuda.CUDAGraph()
    with torch.cuda.graph(own):
        optimizer.step()
    for replays in (3, 2):
        for number in range(replays):
            generator = torch.Generator().manual_seed(number)
            for grad in static:
                grad.copy_(torch.randn(grad.shape, generator=generator))
            own.replay()
        for number in range(6):
            take_step(params, optimizer, 10 * replays + number, nothing, memory)
    torch.cuda.synchronize()
    return params, optimizer


def test_a_users_own_capture_beside_graphs_of_ours() -> None:
    (ours, replayed), (theirs, eager) = captured("auto"), captured(False)
    assert REPLAYED in replayed.explain()
    assert_same(ours, theirs)
    assert_same(replayed.state_dict(), eager.state_dict())
    assert replayed.count.read() == 6 + 3 + 6 + 2 + 6


def test_a_recording_that_fails_costs_nothing_but_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches go on one by one, torch's allocator works as before, and others are recorded."""
    from selective.kernels.gpu.launch import Step

    begin = Step.begin

    def spoiled(self: Any) -> None:
        begin(self)
        if torch.cuda.is_current_stream_capturing():
            torch.ones(1, device=DEVICE).item()

    (_, _, _), (theirs, _, _) = run(lambda graph: wrapped("AdamW", MGUP(), graph=graph), schedule, 9)
    monkeypatch.setattr(Step, "begin", spoiled)
    (ours, failed, _), _ = run(lambda graph: wrapped("AdamW", MGUP(), graph=graph), schedule, 9)
    monkeypatch.undo()
    assert "  launches  made one by one, because recording them failed" in failed.explain()
    assert_same(ours, theirs)
    side, block = torch.cuda.Stream(), torch.empty(1 << 20, device=DEVICE)
    before = torch.cuda.memory_allocated()
    block.record_stream(side)
    del block
    torch.cuda.synchronize()
    torch.empty(1 << 10, device=DEVICE)  # the allocator looks at what other streams have used
    assert torch.cuda.memory_allocated() < before
    assert_equal_runs(lambda graph: wrapped("AdamW", MGUP(), graph=graph))


def test_an_optimizer_that_goes_gives_its_graph_back() -> None:
    from selective.kernels.gpu.graphs import BUDGET

    params, optimizer = wrapped("AdamW", MGUP(), make_params(((2048, 1024), (64,), (7,))))
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before, graphs = torch.cuda.memory_reserved(), len(BUDGET)
    warm(optimizer, params)
    assert REPLAYED in optimizer.explain()
    assert len(BUDGET) == graphs + 1
    del optimizer
    for p in params:
        p.grad = None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert len(BUDGET) == graphs
    assert torch.cuda.memory_reserved() <= before + (4 << 20)  # tables that are kept; the graph had 20 MiB


@pytest.mark.parametrize("last", ["auto", False])
def test_a_chain_shares_a_graph_unless_a_member_has_none(last: Any) -> None:
    results = []
    options: Any
    for options in (["auto", last], [False, False]):
        params = make_params()
        halves = [params[:2], params[2:]]
        members = [
            SelectiveUpdate(AdamW(half, lr=1e-2), policy=MGUP(), graph=graph)
            for half, graph in zip(halves, options, strict=True)
        ]
        chain = ChainedOptimizer(members)
        memory: list[Any] = []
        for number in range(9):
            give_grads(params, number, memory)
            chain.step()
        results.append(params)
        if options[0] == "auto":
            assert (REPLAYED in members[0].explain()) == (last == "auto")
    assert_same(*results)
