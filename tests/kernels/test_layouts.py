"""Layouts of tensors: every change is seen, by torch's own comparison and by the one in Python."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from selective.kernels import layouts
from selective.kernels.layouts import are_compared_by_torch, layouts_of


class Named(Tensor):
    """A tensor of another class."""


def put(x: Tensor, data: Tensor) -> Tensor:
    x.data = data
    return x


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "None in its place": lambda x: None,
    "an object of another class": lambda x: 3.0,
    "a subclass": lambda x: x.detach().as_subclass(Named),
    "a parameter in the place of a tensor": lambda x: Parameter(x.detach()),
    "another dtype": lambda x: x.detach().to(torch.bfloat16),
    "another dtype under the same tensor": lambda x: put(x, x.data.double()),
    "another dtype in the same memory": lambda x: put(x, x.data.view(torch.int32)),
    "another device": lambda x: x.detach().to("meta"),
    "another shape in the same memory": lambda x: put(x, x.data.view(3, 2)),
    "fewer elements in the same memory": lambda x: put(x, x.data[:1]),
    "other strides in the same memory": lambda x: put(x, x.data.as_strided((2, 3), (1, 2))),
    "another number of dimensions": lambda x: put(x, x.data.view(6)),
    "sparse": lambda x: x.detach().to_sparse(),
}


@pytest.fixture(params=["by torch", "in Python"])
def both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "by torch" and not are_compared_by_torch():
        pytest.skip("not with this torch")
    monkeypatch.setattr(layouts, "BY_TORCH", request.param == "by torch")
    with torch.no_grad():
        yield


def some_tensors() -> list[Tensor]:
    return [Parameter(torch.ones(4)), torch.ones(2, 3), torch.ones(()), torch.zeros(0, 2), torch.ones(2, 3).t()]


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change: str) -> None:
    tensors = some_tensors()
    known = layouts_of(tensors)
    assert known is not None
    assert known.are_of(tensors)
    tensors[1] = CHANGES[change](tensors[1])
    assert not known.are_of(tensors)


@pytest.mark.gpu
@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("change", [*CHANGES, "moved to the CPU"])
def test_every_change_of_a_tensor_on_a_gpu_is_seen(change: str) -> None:
    tensors = [Parameter(torch.ones(4, device="cuda")), torch.ones(2, 3, device="cuda"), torch.ones((), device="cuda")]
    known = layouts_of(tensors)
    assert known is not None
    assert known.are_of([x.clone() if type(x) is Tensor else x for x in tensors])
    tensors[1] = CHANGES[change](tensors[1]) if change in CHANGES else tensors[1].cpu()
    assert not known.are_of(tensors)


@pytest.mark.usefixtures("both")
def test_other_values_and_other_memory_are_the_same_layout() -> None:
    known = layouts_of(some_tensors())
    assert known is not None
    assert known.are_of(some_tensors())
    assert not known.are_of(some_tensors()[:-1])
    assert not known.are_of([*some_tensors(), torch.ones(1)])
    none = layouts_of([])
    assert none is not None
    assert none.are_of([])


@pytest.mark.usefixtures("both")
def test_a_tensor_that_is_there_twice_hides_no_change() -> None:
    twice = [torch.ones(2, 3)] * 2
    known = layouts_of(twice)
    assert known is not None
    twice[0].data = twice[0].data.view(3, 2)
    assert not known.are_of(twice)


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("odd", [torch.ones(2).as_subclass(Named), torch.ones(2, 2).to_sparse(), None])
def test_there_are_none_of_other_kinds_of_tensors(odd: Any) -> None:
    assert layouts_of([torch.ones(2), odd]) is None


@pytest.mark.usefixtures("both")
def test_tensors_are_not_kept_alive() -> None:
    x = torch.ones(2)
    known, gone = layouts_of([x]), weakref.ref(x)
    del x
    gc.collect()
    assert known is not None
    assert gone() is None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=3), st.lists(st.integers(0, 3), max_size=3), st.booleans(), st.booleans())
def test_torch_and_python_say_the_same(first: list[int], second: list[int], double: bool, turned: bool) -> None:
    """The comparison in Python is the definition."""
    if not are_compared_by_torch():
        pytest.skip("not with this torch")
    a, b = torch.ones(first), torch.ones(second, dtype=torch.float64 if double else torch.float32)
    b = b.permute(tuple(reversed(range(b.dim())))) if turned else b
    known = layouts_of([a])
    assert known is not None
    assert known.are_of([b]) == (layouts._facts_of(a) == layouts._facts_of(b))


@pytest.mark.parametrize(("version", "tried"), [("2.9.1+cu128", True), ("2.13.0", True), ("2.14.0a0", False)])
def test_an_unknown_torch_is_compared_in_python(monkeypatch: pytest.MonkeyPatch, version: str, tried: bool) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert are_compared_by_torch() == tried
