"""Decay that is a factor in every step and yet not decoupled: it went into a momentum, or neighbours set its size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from selective import Eigenbasis, Policy, SelectiveUpdate
from selective.base.base_facts import base_facts

STEPS = 20
Make = Callable[[list[Tensor]], Optimizer]


class WholeStep(Policy):
    def mask(self, view):
        return torch.ones_like(view.update)


class HalfStep(Policy):
    def mask(self, view):
        return torch.full_like(view.update, 0.5)


class Decaying(Optimizer):
    """A normalised gradient in a momentum; what decay does is the subclass's."""

    def __init__(self, params: Any, lr: float = 1e-2, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def decayed(self, p: Tensor, direction: Tensor, group: dict[str, Any]) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                direction = self.decayed(p, p.grad / (p.grad.norm() + 1e-8), group)
                state = self.state[p]
                state["moment"] = 0.9 * state.get("moment", torch.zeros_like(p)) + direction
                p.sub_(group["lr"] * state["moment"])


class IntoMomentum(Decaying):
    """As NovoGrad, and most of those that normalise first."""

    def decayed(self, p: Tensor, direction: Tensor, group: dict[str, Any]) -> Tensor:
        return direction + group["weight_decay"] * p


class Averaged(Decaying):
    """Beside the momentum, but still a memory: decay by the parameter's running average."""

    def decayed(self, p: Tensor, direction: Tensor, group: dict[str, Any]) -> Tensor:
        average = self.state[p].setdefault("slow pull", torch.zeros_like(p))
        average.lerp_(group["weight_decay"] * p, 0.1)
        p.sub_(group["lr"] * average)
        return direction


class ByNeighbours(Decaying):
    """As AdamS: decoupled, but its size is that of all gradients together, so that no parameter alone tells it."""

    def decayed(self, p: Tensor, direction: Tensor, group: dict[str, Any]) -> Tensor:
        total = sum(float(q.grad.norm()) for q in group["params"])
        p.mul_(1 - group["lr"] * group["weight_decay"] / (1 + total))
        return direction


class Afterwards(Decaying):
    """Decoupled, by a factor that a step on the parameter alone tells, but on what the update has left (APOLLO)."""

    def decayed(self, p: Tensor, direction: Tensor, group: dict[str, Any]) -> Tensor:
        self.state[p].setdefault("count", torch.zeros(()))
        return direction

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["count"] += 1
                p.mul_(1 - group["lr"] * group["weight_decay"] * float(1 - 0.5 ** self.state[p]["count"]))


class ByItself(Decaying):
    """Nothing of this: decoupled, by a factor that is no formula's, but that a step on the parameter alone tells."""

    def decayed(self, p: Tensor, direction: Tensor, group: dict[str, Any]) -> Tensor:
        p.mul_(1 - group["lr"] * group["weight_decay"] / (1 + float(p.grad.norm())))
        return direction


def package(name: str) -> Make:
    def make(params: list[Tensor]) -> Optimizer:
        return getattr(pytest.importorskip("pytorch_optimizer"), name)(params, lr=1e-2, weight_decay=0.1)

    return make


INSIDE = [
    pytest.param(make, id=name)
    for name, make in {
        "into-momentum": IntoMomentum,
        "averaged": Averaged,
        "by-neighbours": ByNeighbours,
        "novograd": package("NovoGrad"),
        "adams": package("AdamS"),
    }.items()
]
SHAPES = [(6, 9), (7, 4)]


def _params(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    make = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=make).to(dtype)) for s in shapes]


def _train(params: list[Tensor], optimizer: Any, steps: int = STEPS) -> None:
    make = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=make).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("make", INSIDE)
@pytest.mark.parametrize("shapes", [SHAPES, [(6, 9), (7,)]], ids=["matrices", "mixed"])
def test_it_is_no_decoupled_decay(make: Make, shapes: list[tuple[int, ...]]) -> None:
    """ "inside", with stand-ins of one number of dimensions (hence one of them) as with several."""
    base = make(_params(shapes))
    facts = base_facts(base, base.param_groups[0], measure=True)
    assert (facts.decay, facts.decay_rule) == ("inside", None)


@pytest.mark.parametrize("make", [ByItself, Afterwards])
@pytest.mark.parametrize("shapes", [SHAPES, [(6, 9), (7,)]], ids=["matrices", "mixed"])
def test_a_factor_that_the_parameter_alone_tells_is_decoupled(make: Make, shapes: list[tuple[int, ...]]) -> None:
    base = make(_params(shapes))
    facts = base_facts(base, base.param_groups[0], measure=True)
    assert (facts.depends_on_param, facts.decay, facts.decay_rule) == (False, "decoupled", "measured")


@pytest.mark.parametrize("make", [ByItself, Afterwards, package("APOLLO")], ids=["by-itself", "afterwards", "apollo"])
def test_a_measured_factor_is_the_bases_own(make: Make) -> None:
    theirs, ours = _params(SHAPES, torch.float64), _params(SHAPES, torch.float64)
    _train(theirs, make(theirs))
    optimizer = SelectiveUpdate(make(ours), policy=WholeStep())
    assert "scratch" in optimizer.explain()
    _train(ours, optimizer)
    for a, b in zip(theirs, ours, strict=True):
        # 20 factors, each from sums of 54 products that are rounded apart, on values up to 4
        torch.testing.assert_close(b.detach(), a.detach(), rtol=0, atol=20 * 54 * 4 * 2**-53)


def test_decay_by_another_name_does_not_make_the_known_one_part_of_the_update() -> None:
    """MARS decays vectors by `weight_decay_1d`: matrices beside them keep their factor."""
    po = pytest.importorskip("pytorch_optimizer")
    base = po.MARS(_params([(6, 9), (7,)]), lr=1e-2, weight_decay=0.1)
    facts = base_facts(base, base.param_groups[0], measure=True)
    assert (facts.depends_on_param, facts.decay, facts.decay_rule) == (True, "decoupled", "measured")


@pytest.mark.parametrize("make", INSIDE)
@pytest.mark.parametrize("capture", ["auto", "delta"])
def test_ones_are_the_bases_own_step(make: Make, capture: Any) -> None:
    theirs, ours = _params(SHAPES), _params(SHAPES)
    _train(theirs, make(theirs))
    _train(ours, SelectiveUpdate(make(ours), policy=WholeStep(), capture=capture))
    for a, b in zip(theirs, ours, strict=True):
        assert torch.equal(a, b)  # delta capture: what is taken off where the mask is 1 is 0 times the update


@pytest.mark.parametrize("make", INSIDE)
def test_decay_is_masked_with_the_update(make: Make) -> None:
    """Half of a step is half of what the parameter would have moved, decay and all."""
    theirs, ours = _params(SHAPES), _params(SHAPES)
    before = [p.detach().clone() for p in theirs]
    _train(theirs, make(theirs), steps=1)
    _train(ours, SelectiveUpdate(make(ours), policy=HalfStep()), steps=1)
    for a, b, start in zip(theirs, ours, before, strict=True):
        # a and a - start are rounded, and the sum: three roundings of values near |p| <= 4
        torch.testing.assert_close(b.detach(), start + (a.detach() - start) / 2, rtol=0, atol=3 * 4 * 2**-24)


@pytest.mark.parametrize("make", INSIDE)
def test_scratch_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"capture='scratch' is not right .*: its weight decay is part of the update"):
        SelectiveUpdate(make(_params(SHAPES)), policy=WholeStep(), capture="scratch")


@pytest.mark.parametrize("make", [IntoMomentum, package("NovoGrad")], ids=["into-momentum", "novograd"])
def test_a_rotation_leaves_linear_ones_as_they_are(make: Make) -> None:
    """Their norm, their momentum and their decay turn with the basis, so the stage must not be seen in the result."""
    theirs, ours = _params(SHAPES, torch.float64), _params(SHAPES, torch.float64)
    _train(theirs, make(theirs))
    _train(ours, SelectiveUpdate(make(ours), preconditioner=Eigenbasis(refresh_every=3)))
    for a, b in zip(theirs, ours, strict=True):
        # each of 20 steps rotates sums of 9 products of values near 1, in and out, and the moment with every basis
        torch.testing.assert_close(b.detach(), a.detach(), rtol=0, atol=20 * 4 * 9 * 2**-53 * 4)
