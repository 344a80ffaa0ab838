"""Scratch and delta work on a group's tensors together: as few operations for many as for few, and the same bits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import pytorch_optimizer as po
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from selective import MGUP, AlphaConsistency, Cautious, Policy, SelectiveUpdate
from selective import foreach as lists
from selective.capture import generic, remember
from selective.kernels import selective_step
from tests.support.base_optimizers import BASES, give_grads

SHAPES = ((12, 8), (33, 7), (6, 6), (64, 64))
t = torch.optim


@pytest.fixture(autouse=True)
def _eager():
    """torchao compiles its step; what is tested is not the compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


def make_params(count: int, *dtypes: torch.dtype) -> list[torch.nn.Parameter]:
    make = torch.Generator().manual_seed(0)
    chosen = [(SHAPES[i % len(SHAPES)], dtypes[i % len(dtypes)]) for i in range(count)]
    return [torch.nn.Parameter(torch.randn(shape, generator=make).to(dtype)) for shape, dtype in chosen]


def count_calls(monkeypatch, fail_at: int = 0) -> list[int]:
    """Counts the tensors of each call of `selective_step`; the call with this number (from 1) raises after its work."""
    sizes: list[int] = []

    def counted(items: Any, **options: Any) -> Any:
        sizes.append(len(items))
        result = selective_step(items, **options)
        if len(sizes) == fail_at:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(generic, "selective_step", counted)
    return sizes


def stepped(make: Any, params: list[torch.nn.Parameter], policy: Policy, steps: int = 3, **options: Any):
    optimizer = SelectiveUpdate(make(params), policy=policy, **options)
    for step in range(steps):
        give_grads(params, step)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("base", "capture"), [("nadam", "scratch"), ("radam", "scratch"), ("adafactor", "delta")], ids=str
)
def test_one_call_for_fifty_tensors(monkeypatch, base: str, capture: str) -> None:
    sizes = count_calls(monkeypatch)
    params = make_params(50, torch.float32)
    optimizer = stepped(BASES[base].make, params, MGUP(), 2, capture=capture)
    assert sizes == [50, 50]
    assert list(optimizer.statistics()) == [f"param_groups[0][{i}]" for i in range(50)]


class Operations(TorchDispatchMode):
    """Counts what would run on a device; making memory and looking at it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ not in ("empty_like", "detach", "view", "as_strided", "alias", "_unsafe_view"):
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("options", [{"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True}, {}], ids=str)
@pytest.mark.parametrize("beta", [None, 0.9])
@pytest.mark.parametrize("capture", ["scratch", "delta"])
@pytest.mark.parametrize("policy", [MGUP(), MGUP(score="momentum"), AlphaConsistency()], ids=repr)
def test_operations_do_not_grow_with_the_tensors(monkeypatch, policy, capture, beta, options, dtypes) -> None:
    """Around a base that works on lists; what the kernel does is its own matter."""

    def operations(count: int) -> Counter[str]:
        params = make_params(count, *dtypes)
        # without momentum in low precision: the policy's float32 copy of it is a conversion for each tensor
        momentum = 0.9 if dtypes == (torch.float32,) else 0.0
        base = t.SGD(params, lr=0.1, momentum=momentum, foreach=True, **options)
        optimizer = SelectiveUpdate(base, policy=policy, capture=capture, momentum_beta=beta, statistics=False)
        give_grads(params, 0)
        optimizer.step()  # makes the state
        with Operations() as seen:
            optimizer.step()
        return seen.found

    if dtypes != (torch.float32,) and beta is None and policy.needs() & {"momentum", "previous_momentum"}:
        pytest.skip("no momentum to read")
    monkeypatch.setattr(generic, "selective_step", lambda items, **options: None)
    few, many = operations(5), operations(50)
    assert few == many
    assert sum(many.values()) <= 25


@pytest.mark.parametrize("policy", [MGUP(), MGUP(score="nesterov"), Cautious(), AlphaConsistency()], ids=repr)
@pytest.mark.parametrize(
    ("base", "capture"),
    [
        ("adamw-plain", "scratch"),
        ("adamw-plain", "delta"),
        ("adam-coupled", "scratch"),
        ("adam-maximize", "scratch"),
        ("adam-maximize", "delta"),
        ("nadam", "auto"),
        ("rmsprop", "auto"),
        ("adafactor", "auto"),
        ("muon", "auto"),
        ("po-lamb", "auto"),
        ("po-stableadamw", "auto"),  # a factor of its own for each parameter
        ("optimi-adamw", "auto"),
        ("transformers-adafactor", "auto"),
        ("torchao-adamw8bit", "auto"),
    ],
    ids=str,
)
def test_the_same_bits_as_one_parameter_at_a_time(monkeypatch, base: str, capture: str, policy: Policy) -> None:
    monkeypatch.setattr(lists, "PART", 600)  # several parts
    dtypes = (torch.float32,) if base == "muon" else (torch.float32, torch.bfloat16)
    together, alone = make_params(12, *dtypes), make_params(12, *dtypes)
    beta = None if BASES[base].momentum or policy.needs() <= {"update", "grad"} else 0.9
    if base in ("po-stableadamw", "optimi-adamw"):  # with a bfloat16 parameter the whole group takes delta
        capture = "delta"
    options: Any = {"policy": policy, "capture": capture, "momentum_beta": beta}
    optimizer = stepped(BASES[base].make, together, **options)
    singles = [SelectiveUpdate(BASES[base].make([p]), **options) for p in alone]
    for step in range(3):
        give_grads(alone, step)
        for single in singles:
            single.step()
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a, b)
    for i, single in enumerate(singles):
        (theirs,) = single.statistics().values()
        ours = optimizer.statistics()[f"param_groups[0][{i}]"]
        assert {k: v.item() for k, v in ours.items()} == {k: v.item() for k, v in theirs.items()}


@pytest.mark.parametrize("capture", ["scratch", "delta"])
def test_one_call_for_each_factor(monkeypatch, capture: str) -> None:
    """Delta needs no factor in the kernel: it starts from the parameter that the base has decayed."""
    factors = {3: 0.5, 5: 0.5, 7: torch.tensor(0.25)}
    params = make_params(9, torch.float32)
    place = {id(p): i for i, p in enumerate(params)}
    monkeypatch.setattr(remember, "plain_number", lambda value: value)  # as if the tensor were on a GPU
    monkeypatch.setattr(remember, "decay_factor", lambda base, group, facts, p: factors.get(place[id(p)], 1.0))
    sizes = count_calls(monkeypatch)
    before = [p.detach().clone() for p in params]
    stepped(lambda p: po.StableAdamW(p, lr=0.0, weight_decay=0.1), params, MGUP(), 1, capture=capture)
    assert sizes == ([6, 2, 1] if capture == "scratch" else [9])
    if capture == "scratch":  # with a learning rate of 0 decay is all that moves
        for i, (p, start) in enumerate(zip(params, before, strict=True)):
            assert torch.equal(p, start * factors.get(i, 1.0))


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize(("base", "capture"), [("radam", "scratch"), ("radam", "delta"), ("po-stableadamw", "delta")])
def test_a_failure_in_the_middle_puts_everything_back(monkeypatch, base: str, capture: str, dtypes) -> None:
    """The second of several calls raises: some parameters have their new values then, some not.

    Scratch has no copy of them where it has exchanged their memory: those which were done stay as they are.
    """
    monkeypatch.setattr(lists, "PART", 600)
    monkeypatch.setattr(generic.GenericJob, "_makes_copies", lambda job: True)
    params = make_params(12, *dtypes)
    optimizer = stepped(BASES[base].make, params, MGUP(), 1, capture=capture)
    sizes = count_calls(monkeypatch, fail_at=2)
    give_grads(params, 1)
    before, grads = [p.detach().clone() for p in params], [p.grad for p in params]
    memory = [p.data_ptr() for p in params]
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert len(sizes) == 2
    done = sum(sizes) if capture == "scratch" else 0
    same = [torch.equal(p, start) for p, start in zip(params, before, strict=True)]
    assert same.count(False) == done
    assert [p.data_ptr() for p in params] == memory
    assert all(p.grad is grad for p, grad in zip(params, grads, strict=True))
    assert {id(p) for p in optimizer.base.state} == {id(p) for p in params}
    monkeypatch.undo()
    optimizer.step()


@pytest.mark.parametrize("where", ["copies", "sums", "zero_"])
def test_a_failure_before_the_base_puts_everything_back(monkeypatch, where: str) -> None:
    params = make_params(6, torch.float32)
    optimizer = stepped(BASES["radam"].make, params, MGUP(), 1)
    real = getattr(lists, where)

    def failing(tensors: Any, *rest: Any, **options: Any) -> None:
        real(tensors[:3], *(r[:3] if isinstance(r, list) else r for r in rest), **options)
        raise MemoryError

    monkeypatch.setattr(lists, where, failing)
    before, grads = [p.detach().clone() for p in params], [p.grad for p in params]
    with pytest.raises(MemoryError):
        optimizer.step()
    assert all(torch.equal(p, start) for p, start in zip(params, before, strict=True))
    assert all(p.grad is grad for p, grad in zip(params, grads, strict=True))
