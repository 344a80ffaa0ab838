"""A step in a CUDA graph: what the wrapper counts and refuses. What is computed is the kernels' matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from selective import Cautious, SelectiveUpdate
from selective.state.entries import STEP

pytestmark = pytest.mark.gpu


def built(capturable: bool) -> tuple[list[torch.nn.Parameter], SelectiveUpdate]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).cuda()) for shape in ((64, 48), (48,))]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).cuda()
    base = torch.optim.AdamW(params, lr=1e-2, capturable=capturable)
    return params, SelectiveUpdate(base, policy=Cautious())


def record(optimizer: SelectiveUpdate) -> Any:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


def saved_step(optimizer: SelectiveUpdate) -> int:
    return int(optimizer.state_dict()["state"][0][STEP])


def test_replays_are_steps() -> None:
    (ours, replayed), (theirs, eager) = built(True), built(True)
    replayed.step()
    torch.cuda.synchronize()
    graph = record(replayed)
    for _ in range(4):
        graph.replay()
    assert saved_step(replayed) == 5
    replayed.step()
    graph.replay()
    for _ in range(7):
        eager.step()
    assert saved_step(replayed) == saved_step(eager) == 7
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch's, of a capture that an error has ended
@pytest.mark.parametrize(("capturable", "steps"), [(False, 1), (True, 0)])
def test_a_graph_that_would_not_step_is_refused(capturable: bool, steps: int) -> None:
    _, optimizer = built(capturable)
    for _ in range(steps):
        optimizer.step()
    with pytest.raises(RuntimeError, match="capturable is False" if steps else "one step before capturing"):
        record(optimizer)
