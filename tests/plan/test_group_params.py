"""GroupParams: what changed under the same parameters is detected, and else nothing is looked at anew."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from selective.kernels import layouts
from selective.kernels.layouts import Layouts
from selective.plan.group_params import GroupParams


def looked_at() -> GroupParams:
    params = GroupParams({"params": [Parameter(torch.ones(2, 3)), Parameter(torch.ones(4))]}, 0, 0)
    params.detect_changes()
    params.memory_changed, params.state_checked = False, True
    return params


def put(p: Tensor, data: Tensor) -> None:
    p.data = data


CHANGES: dict[str, Callable[[Tensor], None]] = {
    "another dtype": lambda p: put(p, p.data.bfloat16()),
    "another shape in the same memory": lambda p: put(p, p.data.view(3, 2)),
    "other strides in the same memory": lambda p: put(p, p.data.as_strided((2, 3), (1, 2))),
    "another dtype in the same memory": lambda p: put(p, p.data.view(torch.float16)),
}


@pytest.mark.parametrize("by_torch", [True, False], ids=["by torch", "in Python"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_under_the_same_parameter_is_detected(
    change: str, by_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "BY_TORCH", by_torch and layouts.are_compared_by_torch())
    params = looked_at()
    before, kinds = params.parameters, params.kinds
    CHANGES[change](params.tensors[0])
    params.detect_changes()
    assert params.parameters is not before
    assert params.memory_changed and not params.state_checked
    assert (params.kinds != kinds) == ("dtype" in change)


def test_a_look_that_sees_no_layouts_would_not_detect_it(monkeypatch: pytest.MonkeyPatch) -> None:
    params = looked_at()
    before = params.parameters
    monkeypatch.setattr(Layouts, "are_of", lambda self, tensors: True)
    CHANGES["another shape in the same memory"](params.tensors[0])
    params.detect_changes()
    assert params.parameters is before and not params.memory_changed


def test_other_memory_is_marked_and_leaves_the_rest() -> None:
    params = looked_at()
    before = params.parameters
    put(params.tensors[1], torch.zeros(4))
    params.detect_changes()
    assert params.parameters is before
    assert params.memory_changed and params.state_checked


def test_nothing_is_looked_at_closely_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    params = looked_at()
    monkeypatch.setattr(GroupParams, "_look_closer", lambda self, same_memory: pytest.fail("looked at closely"))
    params.detect_changes()
    with torch.no_grad():
        params.tensors[0].mul_(2.0)
    params.detect_changes()
    assert not params.memory_changed
