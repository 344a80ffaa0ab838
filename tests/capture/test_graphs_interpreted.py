"""Whole optimizers whose launches are replayed, with interpreted kernels: they step as those without graphs.

Lists of launches stand in for CUDA graphs (`recorded_launches`). `test_graphs.py` has the same, and more, on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from graph_twins import assert_same
from recorded_launches import ListRecorder
from torch import nn
from torch.optim import SGD, AdamW, Muon

from selective import MGUP, Cautious, SelectiveUpdate, Soap
from selective.kernels import use_backend
from selective.kernels.gpu import plan
from selective.kernels.gpu.batches import Plan
from selective.kernels.gpu.graphs import WARM

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
slow = pytest.mark.slow

Make = Callable[[Any, Any], SelectiveUpdate]
CASES: dict[str, Make] = {
    "fused": lambda params, graph: SelectiveUpdate(AdamW(params, lr=0.1), Cautious(), graph=graph),
    "scratch": lambda params, graph: SelectiveUpdate(
        AdamW(params, lr=0.1, amsgrad=True), Cautious(), capture="scratch", graph=graph
    ),
    "delta": lambda params, graph: SelectiveUpdate(
        SGD(params, lr=0.1, momentum=0.9), MGUP(), capture="delta", graph=graph
    ),
    "Muon": lambda params, graph: SelectiveUpdate(Muon(params[:2], lr=0.1), Cautious(), graph=graph),
    "rotated": lambda params, graph: SelectiveUpdate(
        AdamW(params, lr=0.1), Cautious(), preconditioner=Soap(refresh_every=3), graph=graph
    ),
}


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ListRecorder]]:
    """One for each plan that is made; new plans record with it."""
    recorders: list[ListRecorder] = []

    def new_plan(calls: Any, begins: Any) -> Plan:
        recorders.append(ListRecorder())
        return Plan(calls, begins, lambda device: recorders[-1])

    monkeypatch.setattr(plan, "_new_plan", new_plan)
    with use_backend("gpu"), numpy.errstate(all="ignore"):
        yield recorders


def trained(make: Make, graph: Any, steps: int) -> Any:
    """The parameters, the state and the statistics of each step. Gradients are elsewhere in every step."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((6, 4), (4, 6), (5,))]
    optimizer, memory, reports = make(params, graph), [], []
    for number in range(steps):
        memory.append([p.grad for p in params])
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (1 + number)
        optimizer.step()
        reports.append(optimizer.statistics())
    return params, optimizer.state_dict(), reports


@pytest.mark.parametrize("case", [pytest.param(x, marks=() if x == "fused" else slow) for x in CASES])
def test_replays_step_as_launches_do(case: str, recorders: list[ListRecorder]) -> None:
    steps = WARM + 3
    eager = trained(CASES[case], False, steps)
    assert not any(recorder.recordings for recorder in recorders)
    recorders.clear()
    assert_same(trained(CASES[case], "auto", steps), eager)
    replays = [recording.replays for recorder in recorders for recording in recorder.recordings]
    assert replays
    assert max(replays) >= 2
