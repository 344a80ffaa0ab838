"""Many tensors in few operations: the same numbers as one by one, and subclasses through operations of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from selective import foreach as lists
from selective.base.hyperparameters import plain_number


class Named(Tensor):
    """A tensor subclass that notes which functions it was asked for."""

    asked: list[str] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        Named.asked.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


def mixed(seed: int) -> list[Tensor]:
    """Of three dtypes, empty and 0-d ones, channels last and not contiguous."""
    make = torch.Generator().manual_seed(seed)
    image = torch.randn(2, 3, 4, 5, generator=make).to(memory_format=torch.channels_last)
    shapes = ((7,), (3, 5), (), (0,), (4,))
    plain = [torch.randn(shape, generator=make) for shape in shapes]
    return [*plain, image, plain[1].t(), plain[0].double(), plain[1].bfloat16()]


def test_copies_are_equal_in_the_same_memory_format() -> None:
    tensors = mixed(0)
    for copy, tensor in zip(lists.copies(tensors), tensors, strict=True):
        assert torch.equal(copy, tensor)
        assert (copy.dtype, copy.stride()) == (tensor.dtype, tensor.clone().stride())
        assert copy.numel() == 0 or copy.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_sums_are_torchs(wide: bool, as_tensor: bool) -> None:
    first, second = mixed(1), mixed(2)
    scale = torch.tensor(0.3, dtype=torch.float64) if as_tensor else 0.3
    for a, b, made in zip(first, second, lists.sums(first, second, scale, wide=wide), strict=True):
        if wide and a.dtype == torch.bfloat16:
            a, b = a.float(), b.float()
        expected = torch.add(a, b, alpha=0.3)
        assert made.dtype == expected.dtype
        # a product that is rounded by itself where the scale is a tensor: half a digit of it, and one of the sum
        eps = torch.finfo(made.dtype).eps if as_tensor else 0.0
        assert ((made - expected).abs() <= eps * (a.abs() + b.abs())).all()


@pytest.mark.parametrize("as_tensor", [False, True])
def test_adding_a_lower_precision_takes_parts(monkeypatch, as_tensor: bool) -> None:
    monkeypatch.setattr(lists, "PART", 8)
    low = [torch.full((5,), 2.0, dtype=torch.bfloat16) for _ in range(4)]
    wide = [torch.full((5,), float(i)) for i in range(4)]
    lists.add_(wide, low, torch.tensor(0.5) if as_tensor else 0.5)
    assert [t.tolist() for t in wide] == [[i + 1.0] * 5 for i in range(4)]


def test_parts_hold_as_many_elements_as_allowed_or_one_tensor(monkeypatch) -> None:
    monkeypatch.setattr(lists, "PART", 10)
    sizes = [3, 3, 4, 1, 25, 0, 9, 2]
    found = [sizes[part] for part in lists.parts([torch.empty(n) for n in sizes])]
    assert found == [[3, 3, 4], [1], [25], [0, 9], [2]]
    assert list(lists.parts([])) == []


def test_empty_lists_are_no_work() -> None:
    lists.zero_([])
    lists.copy_([], [])
    lists.add_([], [], 2.0)
    lists.lerp_([], [], 0.5)
    assert lists.copies([]) == lists.differences([], []) == lists.sums([], [], 1.0) == lists.negated([]) == []


def test_subclasses_go_through_their_own_operations() -> None:
    ours, other = torch.ones(3).as_subclass(Named), torch.ones(3)
    Named.asked.clear()
    copy, _ = lists.copies([ours, other])
    lists.zero_([ours, other])
    (difference,) = lists.differences([copy], [ours])
    lists.lerp_([ours], [copy], 0.5)
    assert {"clone", "zero_", "sub", "lerp_"} <= set(Named.asked)
    assert not any("foreach" in name for name in Named.asked)
    assert type(copy) is type(difference) is Named
    assert copy.tolist() == difference.tolist() == [1.0] * 3
    assert ours.tolist() == [0.5] * 3
    assert not other.any()


def test_a_number_on_another_device_is_not_read() -> None:
    elsewhere = torch.empty((), device="meta")  # reading it would raise, as on a GPU it would wait
    assert plain_number(elsewhere) is elsewhere
    assert plain_number(torch.tensor(0.5)) == 0.5
    assert type(plain_number(torch.tensor(0.5))) is float
