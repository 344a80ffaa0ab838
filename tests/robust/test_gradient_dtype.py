"""Gradients of another dtype than their parameter: a mask of ones steps as the bare base does, in every capture."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from selective import AdaDiag, CautiousMGUP, Eigenbasis, SelectiveUpdate, Soap
from selective.base import lent_gradients as lending

t = torch.optim
ONES = CautiousMGUP(alpha=1.0, gamma=1.0)
HAS_GRAD_DTYPE = hasattr(torch.Tensor, "grad_dtype")
by_attribute = pytest.mark.skipif(not HAS_GRAD_DTYPE, reason="Tensor.grad_dtype came with torch 2.10")

# Bases that torch itself steps on gradients of another dtype. Those that interpolate (AdamW) do so where decay is
# coupled, because that makes the gradient one of the parameter's dtype.
BASES: dict[str, Any] = {
    "adam": lambda p: t.Adam(p, lr=1e-2, weight_decay=0.1),
    "nadam": lambda p: t.NAdam(p, lr=1e-2, weight_decay=0.1),
    "radam": lambda p: t.RAdam(p, lr=1e-2, weight_decay=0.1, maximize=True),
    "adamax": lambda p: t.Adamax(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: t.SGD(p, lr=1e-2, momentum=0.9),
    "sgd-decay": lambda p: t.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1, maximize=True),
    "rmsprop": lambda p: t.RMSprop(p, lr=1e-2, momentum=0.9),
    "adagrad": lambda p: t.Adagrad(p, lr=1e-2),
    "adadelta": lambda p: t.Adadelta(p, lr=1.0),
    "adafactor": lambda p: t.Adafactor(p, lr=1e-2, weight_decay=0.1),
    "muon": lambda p: t.Muon(p, lr=1e-2, weight_decay=0.1),
    "rprop": lambda p: t.Rprop(p, lr=1e-2),
}
PAIRS = {
    "narrower": (torch.float32, torch.bfloat16),
    "wider": (torch.float32, torch.float64),
    "narrow parameter": (torch.bfloat16, torch.float32),
}
LERPS = ("adam", "nadam", "radam", "adamax")  # torch refuses these where the promoted gradient is not the parameter's
STEPPED = [(base, pair) for base in BASES for pair in PAIRS if pair == "narrower" or base not in LERPS]
WAYS: dict[str, dict[str, Any]] = {
    "auto": {},
    "delta": {"capture": "delta"},
    "own momentum": {"momentum_beta": 0.9},
    "skip": {"on_nonfinite": "skip"},
}
ROTATED: dict[str, dict[str, Any]] = {
    "eigenbasis": {"preconditioner": Eigenbasis(refresh_every=2)},
    "soap, delta": {"preconditioner": Soap(refresh_every=2), "capture": "delta"},
    "adadiag, original": {"preconditioner": AdaDiag(refresh_every=2), "mask_space": "original"},
    "own momentum": {"preconditioner": Eigenbasis(refresh_every=2), "momentum_beta": 0.9},
}


def values(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Normal numbers that bfloat16 has."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def make(base: str, dtypes: tuple[torch.dtype, torch.dtype], options: dict[str, Any] | None) -> Any:
    params = []
    for seed, shape in enumerate([(6, 4), (4, 6)]):
        p = torch.nn.Parameter(values(shape, seed).to(dtypes[0]))
        p.grad_dtype = dtypes[1]  # type: ignore[attr-defined]
        params.append(p)
    optimizer = BASES[base](params)
    return optimizer if options is None else SelectiveUpdate(optimizer, policy=ONES, **options)


def params_of(optimizer: Any) -> list[torch.Tensor]:
    return optimizer.param_groups[0]["params"]


def step(optimizer: Any, number: int, dtype: torch.dtype) -> None:
    for seed, p in enumerate(params_of(optimizer)):
        p.grad = values(tuple(p.shape), 100 * number + seed).to(dtype)
    optimizer.step()


def dtypes_of(optimizer: Any) -> list[dict[str, torch.dtype]]:
    """Of the base's own state."""
    return [
        {k: v.dtype for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor) and "selective/" not in k}
        for p in params_of(optimizer)
    ]


def keeps_float32(base: Any, dtype: torch.dtype) -> bool:
    """Delta capture of low-precision parameters keeps the base's state in float32, whatever gradients are."""
    return dtype == torch.bfloat16 and base.groups.plans[0].capture.way == "delta"


@by_attribute
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("base", "pair"), STEPPED)
def test_a_mask_of_ones_is_the_bare_base(base: str, pair: str, way: str) -> None:
    dtypes = PAIRS[pair]
    bare, wrapped = make(base, dtypes, None), make(base, dtypes, WAYS[way])
    for number in range(4):
        step(bare, number, dtypes[1])
        step(wrapped, number, dtypes[1])
        assert all(p.grad is not None and p.grad.dtype == dtypes[1] for p in params_of(wrapped))
        assert all(p.grad_dtype == dtypes[1] for p in params_of(wrapped))  # type: ignore[attr-defined]
    # torch forms the update in the coarser of the dtypes that meet in it, of which ours is one rounding off in each of
    # four steps; the weights are below 4, and each step is below 0.2. Muon's products are bfloat16 in any case, and
    # ours are others than torch's.
    coarse = torch.bfloat16 in dtypes or (base == "muon" and wrapped.groups.plans[0].capture.way == "fused")
    tolerance = (
        4
        * (4 if dtypes[0] == torch.bfloat16 else 0.2 if coarse else 4)
        * torch.finfo(torch.bfloat16 if coarse else torch.float32).eps
    )
    for p, q in zip(params_of(bare), params_of(wrapped), strict=True):
        assert (p.detach().double() - q.detach().double()).abs().max() <= tolerance
    if not keeps_float32(wrapped, dtypes[0]):
        assert dtypes_of(wrapped) == dtypes_of(bare)


@by_attribute
@pytest.mark.parametrize("way", ROTATED)
@pytest.mark.parametrize(("base", "pair"), [one for one in STEPPED if one[0] not in ("radam", "adamax", "rprop")])
@pytest.mark.filterwarnings("ignore:.*rotates or orthogonalises:UserWarning")
def test_rotated(base: str, pair: str, way: str) -> None:
    """As with a gradient in the parameter's dtype, of the same values; the base's state has the dtypes of the bare
    base's, where that steps such gradients."""
    dtypes = PAIRS[pair]
    bare, wrapped = make(base, dtypes, None), make(base, dtypes, ROTATED[way])
    same = make(base, (dtypes[0], dtypes[0]), ROTATED[way])
    for number in range(4):
        step(bare, number, dtypes[1])
        step(wrapped, number, dtypes[1])
        step(same, number, dtypes[0])
        assert all(p.grad is not None and p.grad.dtype == dtypes[1] for p in params_of(wrapped))
        assert all(p.grad_dtype == dtypes[1] for p in params_of(wrapped))  # type: ignore[attr-defined]
    if not keeps_float32(wrapped, dtypes[0]):
        assert dtypes_of(wrapped) == dtypes_of(bare)
    # The bases of a mask of ones turn what is stepped, and are the same for both: what differs is the rounding of
    # rotated gradients and moments to the coarser dtype, relative to steps below 0.2.
    tolerance = 4 * (4 if dtypes[0] == torch.bfloat16 else 0.4) * torch.finfo(torch.bfloat16).eps
    for p, q in zip(params_of(same), params_of(wrapped), strict=True):
        assert (p.detach().double() - q.detach().double()).abs().max() <= tolerance


@by_attribute
@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize("base", ["sgd", "nadam", "rmsprop", "adafactor"])
def test_state_is_made_saved_loaded_and_copied(base: str, rotated: bool) -> None:
    """`init_state` with such gradients, and a run that goes on from a checkpoint and from a copy as if undisturbed."""
    dtypes = PAIRS["narrower"]
    options: dict[str, Any] = {"preconditioner": Eigenbasis(refresh_every=2)} if rotated else {}
    undisturbed, started = make(base, dtypes, options), make(base, dtypes, options)
    started.init_state()
    assert all(p.grad is None and p.grad_dtype == dtypes[1] for p in params_of(started))  # type: ignore[attr-defined]
    for number in range(2):
        step(undisturbed, number, dtypes[1])
    fresh = make(base, dtypes, options)
    for p, q in zip(params_of(fresh), params_of(undisturbed), strict=True):
        p.data.copy_(q.data)
    fresh.load_state_dict(copy.deepcopy(undisturbed.state_dict()))
    copied = copy.deepcopy(undisturbed)
    for p in params_of(copied):  # torch does not copy it
        p.grad_dtype = dtypes[1]  # type: ignore[attr-defined]
    for optimizer in (undisturbed, fresh, copied):
        for number in range(2, 4):
            step(optimizer, number, dtypes[1])
    for other in (fresh, copied):
        for p, q in zip(params_of(undisturbed), params_of(other), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("way", ["scratch", "fused, rotated", "scratch, rotated"])
def test_data_exchanged_under_a_gradient(way: str) -> None:
    """Master weights: `p.data` become float32 after the backward pass, and the gradient stays. On every torch."""
    make_base = t.SGD if way.startswith("fused") else t.RMSprop
    p = torch.nn.Parameter(values((6, 4), 0))
    rest = torch.nn.Parameter(values((4,), 1))
    base = make_base([p, rest], lr=1e-2, momentum=0.9, weight_decay=0.1)
    optimizer = SelectiveUpdate(base, policy=ONES, preconditioner=Eigenbasis() if "rotated" in way else None)
    for q in (p, rest):
        q.grad = torch.ones_like(q)
        q.data = q.data.float()
    before = [q.detach().clone() for q in (p, rest)]
    optimizer.step()
    for q, old in zip((p, rest), before, strict=True):
        assert q.dtype == torch.float32
        assert q.grad is not None
        assert q.grad.dtype == torch.bfloat16
        assert not torch.equal(q, old)


@by_attribute
@pytest.mark.parametrize("way", ["scratch", "rotated"])
def test_without_the_loan_torch_refuses(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault as it was: what stands in for a gradient was assigned like any other."""
    optimizer = make(
        "rmsprop" if way == "rotated" else "nadam", PAIRS["narrower"], ROTATED["eigenbasis"] if way == "rotated" else {}
    )
    monkeypatch.setattr(lending, "set_gradient", lambda param, grad: setattr(param, "grad", grad))
    if way == "rotated":  # in the dtype of the parameter, as it was
        monkeypatch.setattr("selective.capture.rotated.RotatedJob.base_dtype", lambda self, i: torch.float32)
    with pytest.raises(RuntimeError, match="grad_dtype"):
        step(optimizer, 0, torch.bfloat16)


def node_of(p: torch.Tensor, fired: list[bool]) -> Any:
    """The node that accumulates the gradient, with a hook, as DistributedDataParallel hangs its all-reduce there."""
    node: Any = p.view_as(p).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    node.register_hook(lambda *grads: fired.append(True))
    return node


@by_attribute
def test_a_loan_leaves_the_backward_hooks() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad_dtype = torch.bfloat16  # type: ignore[attr-defined]
    fired: list[bool] = []
    node = node_of(p, fired)
    optimizer = SelectiveUpdate(t.NAdam([p], weight_decay=0.1), policy=ONES)
    for number in range(3):
        p.sum().backward()
        optimizer.step()
        assert len(fired) == number + 1
    assert node is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("way", ["auto", "scratch", "delta"])
@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
def test_no_capture_loses_the_backward_hooks(dtype: torch.dtype, way: Any, rotated: bool) -> None:
    """Delta capture of rotated bfloat16 parameters did: it gave the parameter itself float32 data."""
    p = torch.nn.Parameter(torch.ones(4, 3, dtype=dtype))
    fired: list[bool] = []
    node = node_of(p, fired)
    optimizer = SelectiveUpdate(
        t.AdamW([p]), policy=ONES, capture=way, preconditioner=Eigenbasis(refresh_every=2) if rotated else None
    )
    for number in range(3):
        p.sum().backward()
        optimizer.step()
        assert len(fired) == number + 1
    assert node is not None


def test_data_of_another_dtype_lose_them() -> None:
    """The twin: what delta capture did to rotated parameters."""
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    fired: list[bool] = []
    node = node_of(p, fired)
    own = p.data
    p.data = own.float()
    p.data = own
    p.sum().backward()
    assert fired == []
    assert node is not None
