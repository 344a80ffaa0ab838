"""A measurement finds the facts of bases made for the purpose, and leaves nothing behind."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from selective.base.base_facts import base_facts, call_step, clone_with_stand_ins, decay_factor, read_momentum

Rule = Callable[[Tensor, Tensor, dict[str, Any], dict[str, Any]], None]


class Made(Optimizer):
    """A base from one function of (parameter, gradient, its state, group), which moves the parameter."""

    def __init__(self, params: Any, rule: Rule, lr: Any = 0.1, weight_decay: float = 0.1, **options: Any) -> None:
        self.rule = rule
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **options})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.rule(p, p.grad, self.state[p], group)


def plain(p, g, state, group):
    p.sub_(group["lr"] * g)


def momentum(p, g, state, group, gain=1.0):
    state["velocity"] = 0.9 * state.get("velocity", torch.zeros_like(p)) + g * gain
    p.sub_(group["lr"] * state["velocity"])


def normalised_by_coordinate(p, g, state, group):
    momentum(p, g / (g.abs() + 1e-8), state, group)


def normalised_as_a_whole(p, g, state, group):
    momentum(p, g / (g.norm() + 1e-8), state, group)


def looks_at_param(p, g, state, group):
    p.sub_(group["lr"] * p.norm() * g)


def looks_a_little(p, g, state, group):
    p.sub_(group["lr"] * (1 + 1e-6 * p.norm()) * g)


def coupled(p, g, state, group):
    momentum(p, g + group["weight_decay"] * p, state, group)


def coupled_sign(p, g, state, group):
    p.sub_(group["lr"] * (g + group["weight_decay"] * p).sign())


def odd_factor(p, g, state, group):
    p.mul_(1 - group["weight_decay"] ** 2 * group["lr"] ** 0.5)
    p.sub_(group["lr"] * g)


def decoupled_sign(p, g, state, group):  # keeps nothing, as plain SGD, but its decay is not a gradient
    p.mul_(1 - group["lr"] * group["weight_decay"])
    p.sub_(group["lr"] * g.sign())


def decay_by_agreement(p, g, state, group):
    p.sub_(group["lr"] * (g + group["weight_decay"] * p * (p * g > 0)))


def writes(p, g, state, group):
    p.sub_(group["lr"] * g.mul_(2))


def replaces(p, g, state, group):
    p.sub_(group["lr"] * g)
    p.grad = g.neg()


def clears(p, g, state, group):
    p.sub_(group["lr"] * g)
    p.grad = None


def kahan(p, g, state, group):
    plain(p, g, state, group) if p.dtype == torch.float64 else _kahan(p, g, state, group)


def _kahan(p, g, state, group):
    lost = state.get("lost", torch.zeros_like(p)) - group["lr"] * g
    new = p + lost
    state["lost"] = lost - (new - p)
    p.copy_(new)


def master(p, g, state, group):
    if p.dtype == torch.float64:
        return plain(p, g, state, group)
    state["exact"] = state.get("exact", p.float()) - group["lr"] * g.float()
    p.copy_(state["exact"])
    return None


def slow_weights(p, g, state, group):
    plain(p, g, state, group)
    state["slow"] = state.get("slow", p.clone()).lerp(p, 0.5)


def iterates_by_coordinate(p, g, state, group):
    """FTRL: p comes from z, which holds every iterate times how much its coordinate's size grew. From any start its
    steps are Adagrad's, as long as nobody else moves p."""
    root = state.get("n", torch.zeros_like(p)).sqrt()
    state["n"] = state.get("n", torch.zeros_like(p)) + g * g
    grown = (state["n"].sqrt() - root) / group["lr"]
    state["z"] = state.get("z", torch.zeros_like(p)) + g - grown * p
    p.copy_(-state["z"] * group["lr"] / state["n"].sqrt())


def float32_only(p, g, state, group):
    if p.dtype != torch.float32:
        raise TypeError("float32 only")
    momentum(p, g, state, group)


def random_noise(p, g, state, group):
    p.sub_(group["lr"] * (g + torch.randn_like(g)))


def made(rule: Rule, dtype: torch.dtype = torch.float32, **options: Any) -> Made:
    return Made(
        [torch.nn.Parameter(torch.ones(3, 5, dtype=dtype)), torch.nn.Parameter(torch.ones(4, dtype=dtype))],
        rule,
        **options,
    )


def facts_of(rule: Rule, dtype: torch.dtype = torch.float32, **options: Any):
    base = made(rule, dtype, **options)
    return base_facts(base, base.param_groups[0], measure=True)


@pytest.mark.parametrize(
    "rule,depends", [(plain, False), (looks_at_param, True), (looks_a_little, True), (random_noise, False)]
)
def test_whether_the_update_looks_at_the_parameter(rule: Rule, depends: bool) -> None:
    assert facts_of(rule).depends_on_param is depends


@pytest.mark.parametrize(
    "rule,key", [(momentum, "velocity"), (normalised_by_coordinate, None), (normalised_as_a_whole, None), (plain, None)]
)
def test_a_first_moment_is_known_by_what_it_does(rule: Rule, key: str | None) -> None:
    assert facts_of(rule).momentum_key == key


@pytest.mark.parametrize(
    "rule,decay,formula",
    [
        (plain, "none", None),
        (coupled, "coupled", None),
        (coupled_sign, "coupled", None),
        (decoupled_sign, "decoupled", "1 - lr*weight_decay"),
        (odd_factor, "decoupled", "measured"),
        (decay_by_agreement, "inside", None),
    ],
)
def test_kinds_of_decay(rule: Rule, decay: str, formula: str | None) -> None:
    facts = facts_of(rule)
    assert (facts.decay, facts.decay_rule) == (decay, formula)


def test_a_factor_that_no_formula_has_is_measured_for_the_step_at_hand() -> None:
    base = made(odd_factor)
    facts = base_facts(base, base.param_groups[0])
    base.param_groups[0].update(lr=0.04, weight_decay=0.3)
    param = base.param_groups[0]["params"][0]
    # in float64: 15 sums of products, divided
    assert decay_factor(base, base.param_groups[0], facts, param) == pytest.approx(1 - 0.09 * 0.2, abs=1e-14)


def test_factors_by_formula_are_what_the_base_does() -> None:
    transformers = pytest.importorskip("transformers.optimization")
    po = pytest.importorskip("pytorch_optimizer")
    for make in (transformers.Adafactor, po.StableAdamW, po.SOAP, torch.optim.AdamW):
        ends = []
        for decay in (0.1, 0.0):
            param = torch.nn.Parameter(torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4))
            base = make([param], weight_decay=decay)
            group, generator = base.param_groups[0], torch.Generator().manual_seed(0)
            facts, factors = base_facts(base, group), []
            for _ in range(3):
                param.grad = torch.randn(6, 4, generator=generator, dtype=torch.float64) * 10 ** len(factors)
                if not ends:
                    before, factor = param.detach().clone(), decay_factor(base, group, facts, param)
                    factors.append((before, float(factor)))
                    twin_param = torch.nn.Parameter(before.clone())
                    twin = clone_with_stand_ins(base, [[twin_param]], {"weight_decay": 0.0})
                    twin.param_groups[0].update({k: group[k] for k in ("step",) if k in group})
                    if param in base.state:
                        twin.state[twin_param] = copy.deepcopy(base.state[param])
                    twin_param.grad = param.grad.clone()
                    base.step()
                    call_step(twin)
                    # decay is all that the two differ by; SOAP decays after its step, hence the update in the size
                    gap = (param - twin_param).detach() - (float(factor) - 1) * before
                    assert gap.abs().max() <= (1 - float(factor)) * (before - twin_param).abs().max() + 1e-12, make
                else:
                    base.step()
            ends.append(param)
        assert not torch.equal(*ends)


@pytest.mark.parametrize(
    "rule,written,cleared",
    [(plain, False, False), (writes, True, False), (replaces, True, False), (clears, False, True)],
)
def test_what_happens_to_gradients(rule: Rule, written: bool, cleared: bool) -> None:
    facts = facts_of(rule)
    assert (facts.writes_grad, facts.clears_grad) == (written, cleared)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule,entries", [(plain, ()), (momentum, ()), (kahan, ("lost",)), (master, ("exact",))])
def test_rounding_residue(rule: Rule, entries: tuple[str, ...], dtype: torch.dtype) -> None:
    assert facts_of(rule, dtype).residue == entries


def test_a_class_that_takes_float32_only() -> None:
    facts = facts_of(float32_only)
    assert (facts.depends_on_param, facts.momentum_key, facts.refusal) == (False, "velocity", None)


def test_a_class_that_fills_its_state_in_the_constructor() -> None:
    class Filled(Made):
        def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.1) -> None:
            super().__init__(params, self.move, lr, weight_decay)
            for p in self.param_groups[0]["params"]:
                self.state[p]["velocity"] = torch.zeros_like(p)

        @staticmethod
        def move(p, g, state, group):
            state["velocity"].mul_(0.9).add_(g)
            p.sub_(group["lr"] * (state["velocity"] + group["weight_decay"] * p))

    base = Filled([torch.nn.Parameter(torch.ones(3, 5))])
    facts = base_facts(base, base.param_groups[0])
    assert (facts.refusal, facts.momentum_key, facts.decay) == (None, "velocity", "decoupled")


def test_a_rate_of_zero_or_in_a_tensor_is_no_obstacle() -> None:
    for lr in (0.0, torch.tensor(0.0), torch.tensor(0.1)):
        assert facts_of(coupled, lr=lr).decay == "coupled"


def test_refusals_say_what_was_found() -> None:
    assert "'slow'" in str(facts_of(slow_weights).refusal)
    assert facts_of(slow_weights).embeds_param == ("slow",)
    assert facts_of(iterates_by_coordinate).embeds_param == ("z",)
    assert "'z'" in str(facts_of(iterates_by_coordinate).refusal)
    params = [torch.nn.Parameter(torch.ones(3))]
    lbfgs = torch.optim.LBFGS(params)
    assert "closure" in str(base_facts(lbfgs, lbfgs.param_groups[0]).refusal)
    sparse = torch.optim.SparseAdam(params)
    assert "dense" in str(base_facts(sparse, sparse.param_groups[0], measure=True).refusal)
    wrapper = made(plain)
    wrapper.inner = torch.optim.SGD(params, lr=0.1)
    assert "wrap SGD directly" in str(base_facts(wrapper, wrapper.param_groups[0]).refusal)
    hidden = made(plain)
    hidden.models = {"ours": torch.nn.Linear(2, 2)}
    assert "a model" in str(base_facts(hidden, hidden.param_groups[0]).refusal)

    def fails(p, g, state, group):
        raise RuntimeError("no such device")

    assert "no such device" in str(facts_of(fails).refusal)


def _everything(base: Optimizer) -> dict[str, Any]:
    """All that a measurement could disturb, by content."""
    params = [p for g in base.param_groups for p in g["params"]]
    return {
        "params": [(id(p), p.detach().clone(), p.grad.clone(), id(p.grad), p._version) for p in params],
        "state": copy.deepcopy(list(base.state.values())),
        "groups": [{k: copy.deepcopy(v) for k, v in g.items() if k != "params"} for g in base.param_groups],
        "attributes": {k: id(v) for k, v in vars(base).items()},
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
    }


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(_same(x[k], y[k]) for k in x)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(_same(a, b) for a, b in zip(x, y, strict=True))
    if isinstance(x, Tensor):
        return torch.equal(x, y)
    return numpy.array_equal(x, y) if isinstance(x, numpy.ndarray) else bool(x == y)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1)),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, maximize=True),
        lambda p: Made(p, random_noise),
        lambda p: Made(p, writes),
        lambda p: Made(p, clears),
    ],
)
def test_nothing_of_the_users_is_touched_and_nobodys_hooks_fire(make: Callable[[Any], Optimizer]) -> None:
    fired: list[str] = []
    params = [torch.nn.Parameter(torch.randn(3, 5)), torch.nn.Parameter(torch.randn(7))]
    base = make(params)
    scheduler = torch.optim.lr_scheduler.StepLR(base, 1)  # it puts a step of its own on the instance
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        base.step()
    scheduler.step()
    for p in params:
        p.grad = torch.randn_like(p)
    base.register_step_pre_hook(lambda *_: fired.append("own pre"))
    base.register_step_post_hook(lambda *_: fired.append("own post"))
    handles = [
        register_optimizer_step_pre_hook(lambda *_: fired.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: fired.append("global post")),
    ]
    try:
        before = _everything(base)
        facts = base_facts(base, base.param_groups[0], measure=True)
        assert _same(before, _everything(base))
        assert facts.refusal is None
        assert fired == []
        call_step(base)
        assert fired == ["own pre", "own post"]
    finally:
        for handle in handles:
            handle.remove()


def test_a_step_that_calls_its_parents_fires_no_global_hook() -> None:
    class Child(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    fired: list[str] = []
    param = torch.nn.Parameter(torch.ones(3))
    torch.optim.SGD([param], lr=0.1)  # torch patches the parent's step when one is built
    base, param.grad = Child([param], lr=0.1), torch.ones(3)
    handle = register_optimizer_step_post_hook(lambda *_: fired.append("global"))
    try:
        call_step(base)
        assert fired == []
        base.step()
        assert "global" in fired
    finally:
        handle.remove()
    assert torch.allclose(param.detach(), torch.full((3,), 0.8))


def test_measurements_are_remembered_by_kind_not_by_rate() -> None:
    steps: list[int] = []

    class Counted(torch.optim.SGD):
        def step(self, closure=None):
            steps.append(1)
            return super().step(closure)

    def ask(**options):
        base = Counted([torch.nn.Parameter(torch.ones(4))], **options)
        return base_facts(base, base.param_groups[0])

    facts, taken = ask(lr=0.1), len(steps)
    assert taken > 0
    assert ask(lr=0.5, weight_decay=0.1) == facts
    assert len(steps) == taken
    assert ask(lr=0.1, momentum=0.9).momentum_key == "momentum_buffer"


def test_a_rule_handed_to_the_constructor_is_measured_each_time() -> None:
    assert facts_of(looks_at_param).depends_on_param
    assert not facts_of(plain).depends_on_param


def test_momentum_is_read_in_float32_and_in_the_parameters_shape() -> None:
    param = torch.nn.Parameter(torch.ones(3, 5, dtype=torch.bfloat16))
    base = torch.optim.Adam([param])
    facts = base_facts(base, base.param_groups[0])
    assert read_momentum(base, param, facts) is None
    param.grad = torch.full_like(param, 2.0)
    base.step()
    moment = read_momentum(base, param, facts)
    assert moment is not None
    assert (moment.dtype, moment.shape) == (torch.float32, param.shape)
    assert torch.equal(moment, base.state[param]["exp_avg"].float())


def test_every_formula_of_a_parameters_own_is_a_rule():
    from selective.base.decay import FORMULAS
    from selective.base.facts import PER_PARAMETER

    assert set(FORMULAS) > PER_PARAMETER
