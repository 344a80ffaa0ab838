"""A step, and the comparison of its results with the reference's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..spec import SUM_NAMES, Item, StepCall, StepSpec, Sums
from .difference import Place, difference
from .ranges import Expected, expected_of
from .switch import VARIABLE, folder

Results = list[Sequence[Sums] | None]


def compared(calls: Sequence[StepCall], step: Callable[[], Results]) -> Results:
    """Let `step` step the items of these calls, and return its results, if they are right.

    Raises:
        KernelDifference: a result is not the reference's, and rounding can't explain it.
        RuntimeError: the step goes into a CUDA graph, whose replays run no Python.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"a step that is recorded in a CUDA graph can't be checked ({VARIABLE}): replays would not compare "
            f"anything. Take it outside of the graph, or unset {VARIABLE}"
        )
    before = [[_copy(item) for item in call.items] for call in calls]
    results = step()
    for call, copies, reports in zip(calls, before, results, strict=True):
        for place, (item, copy) in enumerate(zip(call.items, copies, strict=True)):
            _check(item, copy, call.spec, None if reports is None else reports[place])
    return results


def _copy(item: Item) -> Item:
    """The item with memory of its own. Nothing is written before it is read, so that what was shared need not be."""
    state = {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in item.state.items()}
    policy_state = {key: value.detach().clone() for key, value in item.policy_state.items()}
    return Item(item.param.detach().clone(), item.grad.detach().clone(), state, item.address, policy_state, item.shard)


def _check(item: Item, copy: Item, spec: StepSpec, report: Sums | None) -> None:
    """Compare what the kernels made of an item with what the reference makes of its copy."""
    before = _copy(copy)
    expected = expected_of(copy, spec)
    results = {name: _result(name, item, report) for name in expected.values}
    place = next((place for name in results if (place := _place(name, results[name], expected)) is not None), None)
    if place is not None:
        raise difference(place, before, item, expected.values, spec, folder())


def _result(name: str, item: Item, report: Sums | None) -> Tensor | None:
    if name == "param":
        return item.param.detach()
    if name in SUM_NAMES:
        return None if report is None else getattr(report, name)
    return item.policy_state.get(name) if name == "average" else item.state.get(name)


def _place(name: str, result: Tensor | None, expected: Expected) -> Place | None:
    """The worst element of an entry; None if all are right."""
    value, (low, high) = expected.values[name], expected.ranges[name]
    if result is None or result.shape != value.shape or result.dtype != value.dtype:
        raise AssertionError(f"the kernels left no {name!r} of shape {tuple(value.shape)} and {value.dtype}: {result}")
    got, wanted = result.double(), value.double()
    right = (result == value) | (got.isnan() & wanted.isnan()) | ((got >= low) & (got <= high))
    if bool(right.all()):
        return None
    off = torch.where(right, -1.0, torch.nan_to_num((got - wanted).abs(), nan=torch.inf))
    flat = int(off.reshape(-1).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), result.shape))
    low, high = (x.expand(result.shape).reshape(-1)[flat].item() for x in (low, high))
    numbers = got.reshape(-1)[flat].item(), wanted.reshape(-1)[flat].item(), (low, high)
    return Place(name, index, *numbers, int((~right).sum()), result.numel())
