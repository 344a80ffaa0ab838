"""The number of operations in a step of rotated parameters that are stepped in stacks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from rotated_twins import bucket_by_bucket, build, step
from torch.utils._python_dispatch import TorchDispatchMode

from selective import Eigenbasis, SelectiveUpdate
from selective.capture import rotated, rotated_fused, rotated_planned

KINDS = ((6, 4), (4, 6), (5, 5), (7, 3))
VIEWS = frozenset(
    "view transpose unsqueeze slice split split_with_sizes unbind as_strided detach select expand diagonal".split()
)
FOR_A_SHAPE, FOR_A_GROUP = 10, 16  # what may be launched, on a GPU: the kernels' own launches aside
KERNELS = (rotated, rotated_fused, rotated_planned)


class Counted(TorchDispatchMode):
    """Counts torch operations by name, except views, which launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        if name not in VIEWS and not name.startswith("profiler"):
            self.launched[name] += 1
        return func(*args, **(kwargs or {}))


def trained(count: int, space: Any, last: int) -> SelectiveUpdate:
    """An optimizer with `count` matrices of each of four shapes in its second group, five steps old."""
    optimizer = build(space, shapes=((3,),) * 5 + KINDS * count, statistics=False)
    for number in range(last):
        step(optimizer, number)
    return optimizer


def operations(count: int, space: Any, number: int = 5) -> Counter[str]:
    """Count the launches of step `number`, without the two kernel calls of step 5 to 7."""
    optimizer, calls = trained(count, space, number), []
    with pytest.MonkeyPatch.context() as patch:
        for module in KERNELS:
            patch.setattr(module, "selective_step", lambda items, **_: calls.append(len(items)))
        real = optimizer.step
        optimizer.zero_grad()
        for p in (p for group in optimizer.param_groups[1:] for p in group["params"]):
            p.grad = torch.ones_like(p)
        with Counted() as counted:
            real()
    assert sum(calls) == 2 * len(KINDS) * count
    return counted.launched


SPACES = {
    "two": Eigenbasis(refresh_every=1000, start_step=1, stagger=False),
    "one": Eigenbasis(refresh_every=1000, start_step=1, stagger=False, sides="one"),
    "gradient": Eigenbasis(refresh_every=1000, statistic="gradient", stagger=False),
}


@pytest.mark.parametrize("name", SPACES)
def test_a_steady_step_launches_as_much_for_many_matrices_as_for_few(name: str) -> None:
    few, many = (operations(count, SPACES[name]) for count in (1, 6))
    assert few == many
    assert sum(many.values()) <= FOR_A_SHAPE * len(KINDS) + FOR_A_GROUP
    assert many["bmm"] == len(KINDS) * (2 if name == "one" else 4)
    assert many["cat"] == many["stack"] == 0


@pytest.mark.parametrize("statistic", ["ema", "gradient"])
def test_a_refresh_launches_as_much_for_many_matrices_as_for_few(statistic: Any) -> None:
    """Sides of one length are solved together, whatever their shapes: five lengths here, with two factors for each."""
    solver = "cholesky" if statistic == "ema" else "eigh"
    space = Eigenbasis(refresh_every=5, start_step=1, stagger=False, statistic=statistic, solver=solver)
    few, many = (operations(count, space, number=6) for count in (2, 6))
    assert few == many
    assert many["linalg_cholesky_ex" if statistic == "ema" else "_linalg_eigh"] == (10 if statistic == "ema" else 5)


def test_bucket_by_bucket_a_step_launches_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin."""
    bucket_by_bucket(monkeypatch)
    launched = operations(6, SPACES["two"])
    assert sum(launched.values()) > FOR_A_SHAPE * len(KINDS) + FOR_A_GROUP
    assert launched["cat"] > 0
