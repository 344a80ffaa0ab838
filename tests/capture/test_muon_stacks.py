"""Muon's matrices are stepped together: few operations, bounded memory, stacks that miss no matrix."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from muon_problems import (
    RATE,
    SHAPES,
    MuonOnes,
    give_grads,
    make_params,
    momenta,
    same,
    wrapped,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selective import MGUP, Policy
from selective import foreach as lists
from selective.capture import generic, muon_stacks


class Operations(TorchDispatchMode):
    """Counts what would run on a device; making memory and looking at it does not."""

    FREE = ("empty", "new_empty", "empty_like", "detach", "view", "as_strided", "alias", "_unsafe_view", "unbind",
            "transpose", "split", "split_with_sizes", "slice", "reshape", "t")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ not in self.FREE:
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations(count: int, policy: Policy, shapes: Any = ((12, 8), (8, 12), (6, 6)), **options: Any) -> int:
    params = make_params(shapes=[shapes[i % len(shapes)] for i in range(count)])
    optimizer = wrapped(params, policy, wrap={"statistics": False}, **options)
    for step in range(2):
        give_grads(params, step)
        with Operations() as seen:
            optimizer.step()
    return sum(seen.found.values())


@pytest.mark.parametrize("policy", [MGUP(score="nesterov"), MuonOnes()], ids=repr)
def test_operations_do_not_grow_with_the_matrices(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> None:
    """Of two stacks; what the kernel does is its own matter."""
    monkeypatch.setattr(generic, "selective_step", lambda items, **options: None)
    # moving: 3; a stack: 2 norms, limits, quotients, scales and products at most, and three products an iteration
    assert operations(6, policy) == operations(60, policy) <= 3 + 2 * (5 * 2 + 3 * 5)


class Made(TorchDispatchMode):
    """Counts the bytes of all memory that is made, be it freed soon or not."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **kwargs)
        made = {t.untyped_storage() for t in tree_leaves(result) if isinstance(t, torch.Tensor)}
        self.bytes += sum(storage.nbytes() for storage in made if storage.data_ptr() not in before)
        return result


@pytest.mark.parametrize("dtype,bytes_each", [(torch.float32, 12), (torch.bfloat16, 16)], ids=str)
def test_memory_of_a_step(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bytes_each: int) -> None:
    """It is as docs/how-it-works/capture.md says, for square matrices: the largest. In low precision, not at once."""
    monkeypatch.setattr(generic, "selective_step", lambda items, **options: None)
    params = make_params(dtype, shapes=[(64, 64)] * 4)
    optimizer = wrapped(params, wrap={"statistics": False})
    for step in range(2):
        give_grads(params, step)
        with Made() as made:
            optimizer.step()
    elements = sum(p.numel() for p in params)
    assert bytes_each * elements <= made.bytes <= (bytes_each + 0.1) * elements  # and a few numbers of each matrix


@pytest.mark.parametrize("limit", [200, 300])
def test_parts_and_stacks_are_bounded_and_complete(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """With the second limit, tall and wide matrices share a stack that is not the only one of their shape."""
    params = make_params(shapes=[*SHAPES, (64, 64), *SHAPES, (2, 2)])
    monkeypatch.setattr(lists, "PART", 600)
    monkeypatch.setattr(muon_stacks, "STACK", limit)
    parts = list(muon_stacks.parts_in_stacks(params))
    assert sorted(i for part in parts for stack in part for i in stack.indices) == list(range(len(params)))
    for part in parts:
        sizes = [sum(params[i].numel() for i in stack.indices) for stack in part]
        assert sum(sizes) <= 600 or len(part) == 1
        assert all(size <= limit or len(stack.indices) == 1 for size, stack in zip(sizes, part, strict=True))
        for stack in part:
            assert len({tuple(sorted(params[i].shape)) for i in stack.indices}) == 1
            assert all(params[i].shape[0] > params[i].shape[1] for i in stack.tall)
            assert all(params[i].shape[0] <= params[i].shape[1] for i in stack.wide)
    mixed = [params[stack.tall[0]].shape for part in parts for stack in part if stack.wide and stack.tall]
    assert ((12, 8) in mixed) == (limit == 300)


def test_many_parts_take_the_step_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    one, many = make_params(torch.float64), make_params(torch.float64)
    first = wrapped(one, MGUP(score="nesterov"))
    give_grads(one, 0)
    first.step()
    monkeypatch.setattr(lists, "PART", 200)
    monkeypatch.setattr(muon_stacks, "STACK", 100)
    second = wrapped(many, MGUP(score="nesterov"))
    give_grads(many, 0)
    second.step()
    for p, q in zip(one, many, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2.5 * 3 * RATE * 2.0**-4)
    same(momenta(first), momenta(second))
