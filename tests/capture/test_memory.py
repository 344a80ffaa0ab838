"""The memory that is alive while the base steps, against what docs/how-it-works/capture.md and `explain()` say."""

from __future__ import annotations

import gc

import pytest
import torch

from selective import MGUP, Cautious, Policy, SelectiveUpdate
from selective import foreach as lists
from selective.capture import generic
from selective.kernels import selective_step

SHAPE = (256, 256)


def alive() -> int:
    """Bytes of all storages that some tensor holds."""
    # by type and not isinstance: that asks every object for its __class__, and deprecated ones of torch warn
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    tensors = [x for x in tensors if x.device.type == "cpu" and x.shape == SHAPE]
    return sum({s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in tensors)}.values())


def watched(cls: type) -> type:
    """`cls` that notes how much is alive when its step begins."""

    def step(self, closure=None):
        if self.param_groups[0]["params"][0].shape == SHAPE:  # a twin steps smaller ones
            self.alive = alive()
        return cls.step(self, closure)

    return type(f"Watched{cls.__name__}", (cls,), {"step": step})


@pytest.mark.parametrize(
    ("base", "options", "dtype", "copies", "said"),
    [
        (torch.optim.RMSprop, {}, torch.float32, 1, "one copy of the group's parameters during the step"),
        (torch.optim.RAdam, {"weight_decay": 0.1}, torch.float32, 2, "with the decay in them"),
        (torch.optim.RAdam, {"weight_decay": 0.1}, torch.bfloat16, 4, "the policy's float32 and the base's"),
        (torch.optim.Adafactor, {}, torch.float32, 1, "one copy of the group's parameters during the step; after"),
        (torch.optim.Adafactor, {}, torch.bfloat16, 5, "float32 copies of them and of their gradients"),
    ],
    ids=str,
)
def test_copies_alive_during_the_bases_step(base, options, dtype, copies, said) -> None:
    """In copies of the group's parameters."""
    p = torch.nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype))
    optimizer = SelectiveUpdate(watched(base)([p], **options), policy=MGUP(), statistics=False)
    assert said in optimizer.explain()
    for _ in range(2):
        p.grad = torch.full_like(p, 0.1)
        before = alive()
        optimizer.step()
    size = p.numel() * p.element_size()
    assert round((optimizer.base.alive - before) / size, 1) == copies  # 0-d numbers aside


@pytest.mark.parametrize(
    ("base", "policy", "dtype", "more"),
    [
        (torch.optim.RMSprop, MGUP(), torch.float32, 0),
        (torch.optim.NAdam, MGUP(score="momentum"), torch.float32, 0),
        (torch.optim.NAdam, MGUP(score="momentum"), torch.bfloat16, 2),  # the float32 copy of a momentum
        (torch.optim.Adafactor, Cautious(), torch.float32, 1),
    ],
    ids=str,
)
def test_copies_alive_during_the_kernels_step(monkeypatch, base, policy: Policy, dtype, more: int) -> None:
    """One copy of the group's parameters; what is made for the kernels is made for a part of them."""
    make, count = torch.Generator().manual_seed(0), 6
    params = [torch.nn.Parameter(torch.randn(SHAPE, generator=make).to(dtype)) for _ in range(count)]
    size, seen = params[0].numel() * params[0].element_size(), []

    def watching(items, **options):
        seen.append(alive())
        return selective_step(items, **options)

    monkeypatch.setattr(lists, "PART", params[0].numel())
    monkeypatch.setattr(generic, "selective_step", watching)
    optimizer = SelectiveUpdate(base(params), policy=policy, statistics=False)
    for _ in range(2):
        for p in params:
            p.grad = torch.full_like(p, 0.1)
        seen.clear()
        before = alive()
        optimizer.step()
    assert len(seen) == (count if more else 1)
    assert {round((bytes - before) / size, 1) for bytes in seen} == {count + more + 0.0}
