"""Two runs from one start on a GPU, one with CUDA graphs of the step's own and one without: they have to be equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from selective import MGUP, SelectiveUpdate

DEVICE = "cuda"
SHAPES = ((300, 64), (64,), (20_000,), (7,))  # two of them have more than 8,192 elements: brackets
REPLAYED = "  launches  replayed as a CUDA graph"

BASES: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda groups: AdamW(groups, lr=1e-2),  # counts its steps on the host
    "AdamW, fused": lambda groups: AdamW(groups, lr=1e-2, fused=True),
    "AdamW, capturable": lambda groups: AdamW(groups, lr=1e-2, capturable=True),
    "AdamW, amsgrad": lambda groups: AdamW(groups, lr=1e-2, amsgrad=True),
    "AdamW, lr on the device": lambda groups: AdamW(groups, lr=torch.tensor(1e-2, device=DEVICE), capturable=True),
    "SGD": lambda groups: SGD(groups, lr=1e-2, momentum=0.9, nesterov=True),
}

Params = list[nn.Parameter]
Change = Callable[[Params, SelectiveUpdate, int], None]
Report = dict[str, dict[str, Tensor]]


def make_params(shapes: Any = SHAPES, seed: int = 0, dtype: torch.dtype = torch.float32) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype)) for shape in shapes]


def wrapped(base: str = "AdamW", policy: Any = "MGUP", params: Params | None = None, **options: Any) -> Any:
    """Parameters in two groups, and their optimizer."""
    params = make_params() if params is None else params
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}]
    return params, SelectiveUpdate(BASES[base](groups), policy=policy, **options)


def give_grads(params: Params, number: int, memory: list[Any]) -> None:
    """Gradients at new addresses; those before are kept in `memory`, so that theirs are not taken again."""
    memory.append([p.grad for p in params])
    for index, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * number + index)
        p.grad = torch.randn(p.shape, generator=generator).to(p)


def schedule(params: Params, optimizer: SelectiveUpdate, number: int) -> None:
    """Other numbers in every step, of the base and of the policy."""
    for group in optimizer.param_groups:
        rate = 1e-2 / (1 + number)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
        group["weight_decay"] = group["weight_decay"] and 0.1 / (2 + number)
    if isinstance(optimizer.policy, MGUP):
        for policy_group in optimizer.policy_groups:
            policy_group["alpha"] = 1.2 + 0.1 * (number % 3)


def take_step(params: Params, optimizer: SelectiveUpdate, number: int, change: Change, memory: list[Any]) -> Report:
    """A step, and its statistics as they are then."""
    optimizer.zero_grad()
    give_grads(params, number, memory)
    change(params, optimizer, number)
    optimizer.step()
    if not optimizer.options.statistics:
        return {}
    return {name: {key: x.clone() for key, x in row.items()} for name, row in optimizer.statistics().items()}


def run(make: Callable[[Any], Any], change: Change, steps: int) -> Any:
    """Parameters, optimizer and the statistics of each step. `make` is handed the option `graph`."""
    runs = []
    for graph in ("auto", False):
        params, optimizer = make(graph)
        memory: list[Any] = []
        reports = [take_step(params, optimizer, number, change, memory) for number in range(steps)]
        runs.append((params, optimizer, reports))
    return runs


def assert_equal_runs(make: Callable[[Any], Any], change: Change = schedule, steps: int = 9) -> SelectiveUpdate:
    """Run both and compare everything, bit for bit. Returns the optimizer that has replayed."""
    (ours, replayed, mine), (theirs, eager, their) = run(make, change, steps)
    assert REPLAYED in replayed.explain()
    assert "  launches  made one by one, because graph=False" in eager.explain()
    assert_same(ours, theirs)
    assert_same(mine, their)
    assert_same(replayed.state_dict(), eager.state_dict())
    return replayed


def assert_same(ours: Any, theirs: Any, path: str = "") -> None:
    """Equal, tensors bit for bit, NaN included."""
    if isinstance(ours, Tensor):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{path}: {text}")
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), path
        for key, value in ours.items():
            assert_same(value, theirs[key], f"{path}.{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), path
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{path}[{index}]")
    else:
        assert ours == theirs, path
