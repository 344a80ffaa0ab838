"""Policies of a user's own: the two ways that need no kernel, what they may return, read, keep and break."""

from __future__ import annotations

import io
from typing import Any, ClassVar

import pytest
import pytorch_optimizer
import torch
from torch import Tensor

from selective import Cautious, Policy, PolicyError, SelectiveUpdate
from selective.policies import Agreement, Fixed, Selection, Strength

WAYS = ["fused", "scratch", "delta"]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(policy: Any, way: str = "auto", dtype: torch.dtype = torch.float64, **options: Any) -> SelectiveUpdate:
    params = [torch.nn.Parameter(normal(i, *shape).to(dtype)) for i, shape in enumerate([(6, 4), (5,), (2, 3, 2)])]
    base = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)
    return SelectiveUpdate(base, policy=policy, capture=way, **options)  # type: ignore[arg-type]


def parameters(optimizer: SelectiveUpdate) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def step(optimizer: SelectiveUpdate, number: int) -> None:
    for index, p in enumerate(parameters(optimizer)):
        p.grad = normal(100 * (number + 1) + index, *p.shape).to(p.dtype)
    optimizer.step()


def snapshot(optimizer: SelectiveUpdate) -> list[Tensor]:
    return [p.detach().clone() for p in parameters(optimizer)]


class OwnCautious(Policy):
    """The five lines: a mask."""

    cap: float = 10.0

    def mask(self, view):
        agrees = view.update * view.grad > 0
        return agrees / view.mean(agrees.to(view.dtype)).clamp(min=1 / self.cap)


class OwnAgreement(Selection):
    """The other way: one part of one's own, the other of the library's."""

    def select(self, view):
        return view.update * view.grad > 0


class OwnTwice(Strength):
    def multipliers(self, view, selected):
        return 2.0, 0.5, {}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "own,named",
    [
        (OwnCautious(), Cautious()),
        (Policy(selection=OwnAgreement(), strength=Fixed(selected=2, rest=0.5)), None),
        (Policy(selection=Agreement(), strength=OwnTwice()), None),
        (Policy(selection=OwnAgreement(), strength=OwnTwice()), None),
    ],
    ids=["mask", "selection", "strength", "both"],
)
def test_both_ways_do_what_a_kernel_does(own: Policy, named: Policy | None, way: str) -> None:
    named = named or Policy(selection=Agreement(), strength=Fixed(selected=2, rest=0.5))
    ours, theirs = make(own, way), make(named)
    for number in range(10):
        step(ours, number)
        step(theirs, number)
    for a, b in zip(parameters(ours), parameters(theirs), strict=True):
        # float64, numbers of size 1, ten steps of some ten roundings of 2^-53
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    assert all(0 < float(s["share"]) < 1 for s in ours.statistics().values())


class Returns(Policy):
    """Whatever the test wants."""

    what: ClassVar[Any] = None
    reads: ClassVar[frozenset[str]] = frozenset({"update"})

    def mask(self, view):
        return type(self).what(view)


BAD_MASKS = {
    "too-long": (lambda v: torch.ones(7), ["shape (7,)", "(6, 4)", "broadcast"]),
    "wider-than-the-parameter": (lambda v: torch.ones(3, *v.shape), ["shape (3, 6, 4)", "broadcast"]),
    "integers": (lambda v: torch.ones(v.shape, dtype=torch.int64), ["torch.int64", "bool or floating"]),
    "complex": (lambda v: torch.ones(v.shape, dtype=torch.complex64), ["torch.complex64"]),
    "another-device": (lambda v: torch.ones(v.shape, device="meta"), ["on meta", "on cpu"]),
    "a-number": (lambda v: 0.5, ["float", "return a bool or float tensor"]),
    "nothing": (lambda v: None, ["NoneType"]),
    "state-from-nowhere": (lambda v: (torch.ones(v.shape), {"extra": torch.zeros(())}), ["'extra'", "init_state"]),
    "reads-the-undeclared": (lambda v: v.momentum, ["view.momentum", "not declared", "reads: ClassVar"]),
    "reads-the-parameter": (lambda v: v.param > 0, ["view.param", "not declared"]),
    "raises": (lambda v: 1 / 0, ["division by zero"]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", BAD_MASKS)
def test_a_bad_mask_says_so_and_moves_no_parameter(bad: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, parts = BAD_MASKS[bad]
    monkeypatch.setattr(Returns, "what", lambda v: torch.ones_like(v.update))
    optimizer = make(Returns(), way)
    step(optimizer, 0)
    before = snapshot(optimizer)
    monkeypatch.setattr(Returns, "what", function)
    with pytest.raises(RuntimeError) as caught:
        step(optimizer, 1)
    for part in ["Returns", "step 1", "moments have moved", *parts]:
        assert part in str(caught.value)
    assert caught.value.__cause__ is not None
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(optimizer), strict=True))


@pytest.mark.parametrize("good", [True, torch.ones(4), torch.ones(6, 1), torch.tensor(2)], ids=str)
def test_what_broadcasts_is_a_mask(good: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.nn.Parameter(torch.zeros(6, 4))
    optimizer = SelectiveUpdate(torch.optim.SGD([p], lr=1.0, momentum=0.9), policy=Returns())
    monkeypatch.setattr(Returns, "what", lambda v: torch.as_tensor(good).to(torch.float16))
    p.grad = torch.ones(6, 4)
    optimizer.step()
    assert torch.equal(p.detach(), -torch.as_tensor(good).expand(6, 4).float())


class FailsLate(Policy):
    """Raises in the last parameter of its group, when told to."""

    now: ClassVar[bool] = False
    reads: ClassVar[frozenset[str]] = frozenset({"update", "grad", "momentum"})

    def mask(self, view):
        if type(self).now and view.shape == (2, 3, 2):
            raise KeyError("what the user's code says")
        return view.grad * view.momentum > 0


BESIDE = {
    "adamw-fused": (lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1), "fused"),
    "adam-coupled-scratch": (lambda groups: torch.optim.Adam(groups, lr=1e-2, weight_decay=0.1), "scratch"),
    "nadam-auto": (lambda groups: torch.optim.NAdam(groups, lr=1e-2, weight_decay=0.1), "auto"),
    "adamw-delta": (lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1), "delta"),
    "po-lamb-auto": (lambda groups: pytorch_optimizer.Lamb(groups, lr=1e-2, weight_decay=0.1), "auto"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BESIDE)
def test_a_raise_leaves_every_group_as_it_was(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense group, one whose policy runs in a kernel and one with code of its own, which fails in its last tensor."""
    make_base, way = BESIDE[name]
    groups = [
        {"params": [torch.nn.Parameter(normal(10 * i + j, *s).to(dtype)) for j, s in enumerate([(6, 4), (2, 3, 2)])],
         "policy": policy}
        for i, policy in enumerate([None, "MGUP", FailsLate()])
    ]  # fmt: skip
    optimizer = SelectiveUpdate(make_base(groups), capture=way)  # type: ignore[arg-type]
    for number in range(2):
        step(optimizer, number)
    before = snapshot(optimizer)
    grads = [normal(900 + i, *p.shape).to(dtype) for i, p in enumerate(parameters(optimizer))]
    kept = [g.clone() for g in grads]
    for p, g in zip(parameters(optimizer), grads, strict=True):
        p.grad = g
    monkeypatch.setattr(FailsLate, "now", True)
    with pytest.raises(RuntimeError, match=r"(?s)FailsLate failed in step 2.*user's code says.*moments have moved"):
        optimizer.step()
    for p, start, own, same in zip(parameters(optimizer), before, grads, kept, strict=True):
        assert torch.equal(p, start)
        assert p.grad is own  # coupled decay lends the base another gradient; it is given back
        assert torch.equal(own, same)
    assert {id(p) for p in parameters(optimizer)} >= {id(p) for p in optimizer.base.state}  # no stand-in is left
    monkeypatch.setattr(FailsLate, "now", False)
    step(optimizer, 2)
    assert all(not torch.equal(a, b) for a, b in zip(before, parameters(optimizer), strict=True))
    assert all(bool(p.isfinite().all()) for p in parameters(optimizer))


class Hysteresis(Policy):
    """A coordinate changes sides only after two steps in a row that say so."""

    def init_state(self, view):
        return {"on": torch.ones(view.shape), "doubts": torch.zeros(view.shape)}

    def mask(self, view):
        on = view.state["on"] > 0
        disagrees = (view.update * view.grad > 0) != on
        doubts = torch.where(disagrees, view.state["doubts"] + 1, torch.zeros_like(view.state["doubts"]))
        on = on ^ (doubts >= 2)
        return on, {"on": on.float(), "doubts": torch.where(doubts >= 2, 0.0, doubts)}


@pytest.mark.parametrize("way", WAYS)
def test_state_of_a_policy_is_checkpointed(way: str) -> None:
    straight, first = make(Hysteresis(), way), make(Hysteresis(), way)
    for number in range(6):
        step(straight, number)
        step(first, number)
    buffer = io.BytesIO()
    torch.save([first.state_dict(), snapshot(first)], buffer)
    buffer.seek(0)
    state, values = torch.load(buffer, weights_only=True)
    assert {"selective/state/on", "selective/state/doubts"} <= state["state"][0].keys()
    second = make(Hysteresis(), way)
    with torch.no_grad():
        for p, value in zip(parameters(second), values, strict=True):
            p.copy_(value)
    second.load_state_dict(state)
    for number in range(6, 12):
        step(straight, number)
        step(second, number)
    assert all(torch.equal(a, b) for a, b in zip(parameters(straight), parameters(second), strict=True))
    fresh = make(Hysteresis(), way)  # and the state is what decides: without it the run is another one
    with torch.no_grad():
        for p, value in zip(parameters(fresh), values, strict=True):
            p.copy_(value)
    fresh.base.load_state_dict(first.base.state_dict())
    for number in range(6, 12):
        step(fresh, number)
    assert not all(torch.equal(a, b) for a, b in zip(parameters(straight), parameters(fresh), strict=True))


def test_reads_are_checked_where_the_class_is_written() -> None:
    with pytest.raises(TypeError, match=r"reads names \['gradient'\].*it has update, grad"):

        class Misspelt(Policy):
            reads: ClassVar[frozenset[str]] = frozenset({"update", "gradient"})


def test_a_policy_that_says_nothing_is_refused_before_anything_moves() -> None:
    class SaysNothing(Policy):
        pass

    with pytest.raises(TypeError, match=r"SaysNothing \(param_groups\[0\]\) says nothing: override mask"):
        SelectiveUpdate(torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))]), policy=SaysNothing())


def test_a_hyper_parameter_beside_its_policy_is_refused() -> None:
    group = {"params": [torch.nn.Parameter(torch.ones(3))], "policy": "MGUP", "tau": 0.3}
    with pytest.raises(ValueError, match=r"'tau' beside its policy MGUP\(\).*'policy': \{'kind': 'MGUP', 'tau'"):
        SelectiveUpdate(torch.optim.AdamW([group]))


class Undeclared(Selection):
    reads: ClassVar[frozenset[str]] = frozenset({"momentum"})

    def select(self, view):
        return view.momentum * view.grad > 0


class UndeclaredStrength(OwnTwice):
    def multipliers(self, view, selected):
        return view.param.mean(), 0.0, {}


@pytest.mark.parametrize(
    ("policy", "named"),
    [
        (Policy(selection=Undeclared(), strength=Fixed()), "Undeclared"),
        (Policy(selection=Agreement(), strength=UndeclaredStrength()), "UndeclaredStrength"),
        (Policy(selection=OwnAgreement(), strength=UndeclaredStrength()), "OwnAgreement and UndeclaredStrength"),
    ],
)
def test_an_error_names_the_class_whose_code_it_is(policy: Policy, named: str) -> None:
    with pytest.raises(PolicyError) as found:
        step(make(policy), 0)
    assert str(found.value).startswith(f"SelectiveUpdate: {named} failed in step 0: {named}: view.")
    assert "Write in the class: reads: ClassVar = frozenset({" in str(found.value)
    assert policy.code_name() == named and "Combined" not in str(found.value)


def test_a_policy_of_known_parts_is_called_policy() -> None:
    assert Policy(selection=Agreement(), strength=Fixed()).code_name() == "Policy"
    assert Cautious().code_name() == "Cautious"
