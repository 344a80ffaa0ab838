"""The memory that scratch capture steps on: exchanged for zeros where that can be done, zeroed in place elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from selective import MGUP, CautiousMGUP, Policy, SelectiveUpdate
from selective import foreach as lists
from selective.base.base_facts import base_facts
from tests.support.base_optimizers import give_grads


class HoldsMemory(torch.optim.Optimizer):
    """Sign descent on memory that it got hold of in its first step, as optimizers with flat buffers do."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})
        self.flat: dict[int, Tensor] = {}

    def seen(self, p: Tensor) -> Tensor:
        if id(p) not in self.flat:
            self.flat[id(p)] = p.data
        return self.flat[id(p)]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.where_it_writes(p).sub_(group["lr"] * p.grad.sign())

    def where_it_writes(self, p: Tensor) -> Tensor:
        return self.seen(p)


class LooksAgain(HoldsMemory):
    def where_it_writes(self, p: Tensor) -> Tensor:
        return p.data


class Watched(LooksAgain):
    """Notes where its parameters are while it steps."""

    def step(self, closure: Any = None) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        self.where, self.all_zero = [p.data_ptr() for p in params], not any(p.any() for p in params)
        super().step()


class OnesThatMayRaise(Policy):
    def mask(self, view):
        return torch.ones_like(view.update)


def make_params() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 7), (64,), (), (0, 3), (2, 3, 4, 5)]
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    last = params[-1]
    last.data = last.data.contiguous(memory_format=torch.channels_last)
    return params


def test_who_keeps_memory_is_found_out() -> None:
    kept, looked = (base_facts(cls(p), {"params": p, "lr": 0.1, "weight_decay": 0.0})
                    for cls, p in ((HoldsMemory, make_params()), (LooksAgain, make_params())))  # fmt: skip
    assert (kept.keeps_memory, looked.keeps_memory) == (True, False)


@pytest.mark.parametrize("policy", [CautiousMGUP(), MGUP()], ids=repr)
def test_both_step_the_same(policy) -> None:
    results = []
    for cls in (HoldsMemory, LooksAgain):
        params = make_params()
        optimizer = SelectiveUpdate(cls(params), policy=policy, capture="scratch")
        for step in range(3):
            give_grads(params, step)
            optimizer.step()
        results.append(params)
    start = make_params()
    for a, b, first in zip(*results, start, strict=True):
        assert torch.equal(a, b)
        assert a.numel() == 0 or not torch.equal(a, first)


def test_without_the_finding_out_nothing_would_be_masked(monkeypatch) -> None:
    """The failing twin: the held memory is the parameter's own, which the base then steps by itself."""
    monkeypatch.setattr("selective.base.measure._keeps_memory", lambda prober, usual: False)
    monkeypatch.setattr("selective.base.base_facts._cache", {})
    params, plain = make_params()[:1], make_params()[:1]
    base = HoldsMemory(params, lr=0.125)
    optimizer = SelectiveUpdate(base, policy=CautiousMGUP(), capture="scratch")
    for p in (*params, *plain):
        base.seen(p)  # before the step, as after an earlier one
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(params[0], plain[0] - 0.125)  # the plain step, without its mask


@pytest.mark.parametrize("own_code", [False, True])
def test_memory_is_exchanged_unless_a_policy_may_raise(own_code: bool) -> None:
    params = make_params()
    homes, tensors = [p.data_ptr() for p in params], list(params)
    base = Watched(params)
    optimizer = SelectiveUpdate(base, policy=OnesThatMayRaise() if own_code else CautiousMGUP(), capture="scratch")
    strides = [p.stride() for p in params]
    for step in range(2):
        give_grads(params, step)
        optimizer.step()
        elsewhere = [a != b for a, b, p in zip(base.where, homes, params, strict=True) if p.numel()]
        assert elsewhere == [not own_code] * 4
        assert base.all_zero
        assert [p.data_ptr() for p in params] == homes
        assert [p.stride() for p in params] == strides
        assert all(a is b for a, b in zip(params, tensors, strict=True))


def test_memory_with_gaps_is_not_exchanged() -> None:
    storage = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    gaps = torch.nn.Parameter(storage[:, ::2])
    base, around = Watched([gaps]), storage[:, 1::2].clone()
    optimizer = SelectiveUpdate(base, policy=CautiousMGUP(), capture="scratch")
    gaps.grad = torch.ones_like(gaps)
    before = gaps.detach().clone()
    optimizer.step()
    assert base.where == [gaps.data_ptr()] == [storage.data_ptr()]
    assert torch.equal(storage[:, 1::2], around)
    assert not torch.equal(gaps, before)


@pytest.mark.parametrize("exchanged", [True, False])
def test_a_base_that_raises_leaves_parameters_as_they_were(exchanged: bool, monkeypatch) -> None:
    class Raises(LooksAgain):
        raising = False

        def step(self, closure: Any = None) -> None:
            super().step()
            if self.raising:
                raise RuntimeError("no")

    if not exchanged:
        monkeypatch.setattr(lists, "is_plain_and_dense", lambda tensor: False)
    params = make_params()
    base = Raises(params)
    optimizer = SelectiveUpdate(base, policy=CautiousMGUP(), capture="scratch")
    give_grads(params, 0)
    optimizer.step()
    before, homes = [p.detach().clone() for p in params], [p.data_ptr() for p in params]
    base.raising = True
    with pytest.raises(RuntimeError, match="no"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert [p.data_ptr() for p in params] == homes


def test_zeros_are_zero_apart_and_of_the_same_strides(monkeypatch) -> None:
    monkeypatch.setattr(lists, "PART", 100)
    tensors = [*make_params(), torch.ones(3, dtype=torch.bfloat16), torch.ones(70, dtype=torch.float64)]
    made = lists.zeros_like([t.detach() for t in tensors])
    for zeros, like in zip(made, tensors, strict=True):
        assert (zeros.shape, zeros.stride(), zeros.dtype) == (like.shape, like.stride(), like.dtype)
        assert zeros.count_nonzero() == 0
        assert zeros.numel() == 0 or zeros.storage_offset() * zeros.element_size() % 512 == 0
    for number, zeros in enumerate(made):
        zeros.fill_(number + 1)
    assert all((zeros == number + 1).all() for number, zeros in enumerate(made))


class RaisesInTheMask(Policy):
    def mask(self, view):
        raise RuntimeError("no")


def test_a_sharded_parameter_is_put_back() -> None:
    """A DTensor has no address of its own, by which nothing could be told."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
        p.grad = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
        optimizer = SelectiveUpdate(torch.optim.NAdam([p], lr=1e-2), policy=RaisesInTheMask())
        with pytest.raises(RuntimeError, match="no"):
            optimizer.step()
        assert torch.equal(p.detach().to_local(), torch.ones(4, 4))
    finally:
        dist.destroy_process_group()
