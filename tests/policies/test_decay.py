"""Decoupled decay is never masked, coupled decay is part of the gradient that a policy sees; through every capture."""

from __future__ import annotations

from typing import ClassVar

import pytest
import pytorch_optimizer
import torch
from base_optimizers import BASES, build, give_grads, make_params

from selective import Policy, SelectiveUpdate
from selective.base.base_facts import base_facts, decay_factor

DECAYS = {
    "decoupled": ["adamw-foreach", "adamw-fused", "adamw-plain", "nadam", "muon", "adafactor", "po-lion", "po-lamb",
                  "po-came", "po-tiger", "po-stableadamw", "optimi-adamw", "optimi-lion", "transformers-adafactor",
                  "transformers-adafactor-fixed", "torchao-adamw8bit"],
    "coupled": ["sgd-momentum", "sgd-dampening", "adam-maximize", "adam-coupled", "nadam-coupled", "radam", "adamax",
                "adagrad", "po-ademamix"],
}  # fmt: skip
LR, DECAY = 1e-2, 0.1  # of all the decoupled ones
STEPS = 3


def captures(name: str) -> list[str]:
    ways = ["fused", "scratch", "delta"]
    return ways[ways.index(BASES[name].way) :]


DECOUPLED = [(name, way) for name in DECAYS["decoupled"] for way in captures(name)]
COUPLED = [(name, way) for name in DECAYS["coupled"] for way in captures(name)]


@pytest.fixture(autouse=True)
def _eager():
    """torchao compiles its step; what is tested is not the compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


class LetsNothingThrough(Policy):
    """A mask of zeros in code of its own."""

    def mask(self, view):
        return torch.zeros_like(view.update)


class EveryOther(Policy):
    """Masks every other coordinate out."""

    def mask(self, view):
        return (torch.arange(view.update.numel()) % 2).reshape(view.shape).to(view.dtype)


class KeepsGradients(Policy):
    """Keeps what it is shown, and lets everything through."""

    reads: ClassVar[frozenset[str]] = frozenset({"grad", "update", "param"})
    seen: ClassVar[list[tuple[torch.Tensor, torch.Tensor]]] = []

    def mask(self, view):
        self.seen.append((view.grad.clone(), view.param.clone()))
        return torch.ones_like(view.update)


def written_factor(name: str, p: torch.Tensor, grads: list[torch.Tensor]) -> float:
    """The factor on the parameter as the base's documentation has it, in the step of the last of these gradients."""
    if name == "transformers-adafactor":  # relative step times the parameter's own scale
        scale = max(1e-3, float(p.detach().double().square().mean().sqrt()))
        return 1 - DECAY * scale * min(1e-2, len(grads) ** -0.5)
    if name == "po-stableadamw":  # lr over the RMS of g / sqrt(v), where that is above 1; v bias-corrected, with this g
        beta, squares = 0.99, [g.double().square() for g in grads]
        v = sum(beta**age * g for age, g in enumerate(reversed(squares))) * (1 - beta) / (1 - beta ** len(grads))
        return 1 - DECAY * LR / max(1.0, float((squares[-1] / v.clamp(min=1e-16)).mean().sqrt()))
    return 1 - LR * DECAY


def measured_decay(name: str, params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """The parameters after the base's own decay alone, in its first step: p + (with decay - without)."""
    moved = []
    for decay in (True, False):
        twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
        twin = build(BASES[name], twins)
        for group in twin.param_groups:
            group["weight_decay"] = group["weight_decay"] if decay else 0.0
        give_grads(twins, 0)
        twin.step()
        moved.append([q.detach() for q in twins])
    return [p.detach() + with_it - without for p, with_it, without in zip(params, *moved, strict=True)]


@pytest.mark.parametrize("policy", [LetsNothingThrough(), EveryOther()], ids=["zeros", "checker"])
@pytest.mark.parametrize("name,way", DECOUPLED)
def test_decoupled_decay_reaches_masked_coordinates(name: str, way: str, policy: Policy) -> None:
    base = BASES[name]
    dtype = torch.float64 if base.double else torch.float32
    params = make_params(base, dtype)
    optimizer = SelectiveUpdate(build(base, params), policy=policy, capture=way)  # type: ignore[arg-type]
    grads: list[list[torch.Tensor]] = [[] for _ in params]
    for step in range(STEPS):
        give_grads(params, step)
        for p, past in zip(params, grads, strict=True):
            assert p.grad is not None
            past.append(p.grad.clone())
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for p, start, past in zip(params, before, grads, strict=True):
            wanted = start * written_factor(name, start, past)
            off = torch.ones_like(p, dtype=torch.bool)
            if isinstance(policy, EveryOther):
                off = (torch.arange(p.numel()) % 2 == 0).reshape(p.shape)
            # The product, and in delta the update that is taken away and added again (at most lr times some tens).
            # transformers computes the parameter's scale, a share of 1e-3 of the factor, in float32.
            eps = torch.finfo(dtype).eps + (1e-3 * 2.0**-23 if name == "transformers-adafactor" else 0.0)
            worst = ((p.detach() - wanted).abs() / (4 * eps * (start.abs() + 0.2)))[off].max().item()
            assert worst <= 1, f"step {step}: {worst:.2g} of the room; decay did not reach a masked coordinate alone"


@pytest.mark.parametrize("way", ["scratch", "delta"])
def test_a_base_that_does_not_decay_in_its_first_step(way: str) -> None:
    """SOAP of pytorch_optimizer only initialises in its first step."""
    params = [torch.nn.Parameter(torch.ones(4, 3, dtype=torch.float64))]
    base = pytorch_optimizer.SOAP(params, lr=LR, weight_decay=DECAY)
    optimizer = SelectiveUpdate(base, policy=LetsNothingThrough(), capture=way)  # type: ignore[arg-type]
    for step in range(STEPS):
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
        wanted = torch.full((4, 3), (1 - LR * DECAY) ** step, dtype=torch.float64)
        torch.testing.assert_close(params[0].detach(), wanted, rtol=1e-14, atol=0)  # a few roundings of 2^-53 a step


@pytest.mark.parametrize("name,way", COUPLED)
def test_coupled_decay_is_in_the_gradient_that_a_policy_sees(name: str, way: str) -> None:
    params = make_params(BASES[name], torch.float64)
    base = build(BASES[name], params)
    group = base.param_groups[0]
    optimizer = SelectiveUpdate(base, policy=KeepsGradients(), capture=way)  # type: ignore[arg-type]
    for step in range(STEPS):
        give_grads(params, step)
        raw = [p.grad.clone() for p in params if p.grad is not None]
        before = [p.detach().clone() for p in params]
        KeepsGradients.seen.clear()
        optimizer.step()
        assert len(KeepsGradients.seen) == len(params)
        for (grad, start), g, p in zip(KeepsGradients.seen, raw, before, strict=True):
            assert torch.equal(start, p)
            wanted = (-g if group.get("maximize") else g) + group["weight_decay"] * p  # as torch's documentation has it
            torch.testing.assert_close(grad, wanted, rtol=1e-15, atol=1e-15)  # float64: two roundings


@pytest.mark.parametrize("name,way", COUPLED)
def test_coupled_decay_is_masked_with_the_update(name: str, way: str) -> None:
    params = make_params(BASES[name], torch.float64)
    before = [p.detach().clone() for p in params]
    optimizer = SelectiveUpdate(build(BASES[name], params), policy=LetsNothingThrough(), capture=way)  # type: ignore[arg-type]
    for step in range(STEPS):
        give_grads(params, step)
        optimizer.step()
    for p, start in zip(params, before, strict=True):
        if way == "delta":  # takes the update away and adds it again: a rounding or two of 2^-53 a step
            torch.testing.assert_close(p.detach(), start, rtol=4e-16 * STEPS, atol=1e-16)
        else:
            assert torch.equal(p.detach(), start)


@pytest.mark.parametrize("kind,name", [(kind, name) for kind, names in DECAYS.items() for name in names])
def test_facts_say_which_it_is(kind: str, name: str) -> None:
    """Both ways to know: the table, where the class is in it, and the measurement."""
    params = make_params(BASES[name])
    base = build(BASES[name], params)
    for measure in (False, True):
        facts = base_facts(base, base.param_groups[0], measure=measure)
        assert facts.refusal is None
        assert facts.decay == kind
    if kind == "coupled":
        assert facts.decay_sign == (-1.0 if base.param_groups[0].get("maximize") else 1.0)
    if kind == "decoupled":
        give_grads(params, 0)
        for p, wanted in zip(params, measured_decay(name, params), strict=True):
            assert p.grad is not None
            factor = float(decay_factor(base, base.param_groups[0], facts, p))
            assert factor == pytest.approx(written_factor(name, p, [p.grad]), rel=1e-6)  # float32 hyper-parameters
            if name != "po-lamb":  # its trust ratio sees the decayed parameter, so that the difference is not the decay
                # differences of float32 numbers of the size of p, which is below 4
                torch.testing.assert_close(p.detach() * factor, wanted, rtol=0, atol=8 * 2.0**-23)
