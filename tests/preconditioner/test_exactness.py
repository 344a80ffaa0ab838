"""A rotation changes what it has to and nothing else: against plain torch, and against Adam written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from base_optimizers import BASES, build, give_grads
from transforms import FixedRotation, Turning, Unrotated, rotation

from selective import (
    MGUP,
    AlphaConsistency,
    Cautious,
    CautiousMGUP,
    Dense,
    Grams,
    Magma,
    Policy,
    RandomMask,
    SelectiveUpdate,
    SkipUpdate,
)

EPS = torch.finfo(torch.float32).eps
SHAPES = ((12, 8), (8,), (5, 4, 3), (12, 8), (33, 7))


class RotatedLeaning(Policy):
    """Code of its own, which reads everything that there is."""

    reads = frozenset({"update", "grad", "param"})

    def mask(self, view):
        return torch.where(view.update * view.grad > 0.01 * view.param.abs(), 1.0, 0.25)


POLICIES: dict[str, Policy] = {
    "dense": Dense(),
    "alpha": AlphaConsistency(),
    "mgup": MGUP(),
    "mgup-nesterov": MGUP(score="nesterov"),
    "cautious-mgup": CautiousMGUP(),
    "cautious": Cautious(),
    "grams": Grams(),
    "magma": Magma(),
    "skip": SkipUpdate(),
    "random": RandomMask(),
    "control": RandomMask.matching(Cautious()),
    "own-code": RotatedLeaning(),
}
NAMES = ("adamw-foreach", "adam-maximize", "sgd-momentum", "po-lion", "nadam", "nadam-coupled", "adafactor",
         "transformers-adafactor", "optimi-adamw")  # fmt: skip


def parameters(dtype: torch.dtype, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def train(name: str, dtype: torch.dtype, steps: int, **options: Any) -> list[torch.Tensor]:
    params = parameters(dtype)
    optimizer = SelectiveUpdate(build(BASES[name], params), **options)
    for step in range(steps):
        give_grads(params, step)
        optimizer.step()
    return [p.detach() for p in params]


def cells() -> list[Any]:
    """Every base with every policy, with the dtypes in turns; the other half is slow."""
    return [
        pytest.param(name, policy, dtype, marks=[] if (i + j + k) % 2 else pytest.mark.slow)
        for i, name in enumerate(NAMES)
        for j, policy in enumerate(POLICIES)
        for k, dtype in enumerate((torch.float32, torch.bfloat16))
    ]


@pytest.mark.parametrize(("name", "policy", "dtype"), cells())
def test_the_identity_changes_nothing_but_rounding(name: str, policy: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"policy": POLICIES[policy]}
    needs_momentum = bool(POLICIES[policy].needs() & {"momentum", "previous_momentum"})
    if needs_momentum and not BASES[name].momentum:
        options["momentum_beta"] = 0.9
    steps = 6
    expected = train(name, dtype, steps, **options)
    found = train(name, dtype, steps, preconditioner=Unrotated(), matrix_view="experts", **options)
    assert torch.equal(found[1], expected[1])  # a vector: not rotated, and in another capture's hands
    for a, b in zip(found, expected, strict=True):
        # Two roundings of a parameter around 1 in each step: of the update that is subtracted, and of the difference.
        size = b.float().abs().clamp(min=1.0) * torch.finfo(dtype).eps
        worst = ((a.float() - b.float()).abs() / size).max()
        assert worst <= 2 * steps, f"{worst:.1f} roundings away, shape {tuple(a.shape)}"


def test_a_rotation_is_noticed_by_that_comparison() -> None:
    expected = train("adamw-foreach", torch.float32, 6, policy=Dense())
    found = train("adamw-foreach", torch.float32, 6, policy=Dense(), preconditioner=FixedRotation())
    assert torch.equal(found[2], expected[2])  # 3-D
    assert ((found[0] - expected[0]).abs() > 1e-3).float().mean() > 0.5


@pytest.mark.parametrize("preconditioner", [FixedRotation(), Turning()], ids=["fixed", "turning"])
@pytest.mark.parametrize("name", ["sgd-momentum", "sgd-nesterov", "sgd-dampening"])
def test_sgd_does_not_see_a_rotation(name: str, preconditioner: Any) -> None:
    """Its step is linear in its gradients, so that with the momentum carried along every rotation cancels."""
    expected = train(name, torch.float32, 20, policy=Dense())
    found = train(name, torch.float32, 20, policy=Dense(), preconditioner=preconditioner, matrix_view="experts")
    for a, b in zip(found, expected, strict=True):
        # a step's products of 33 terms round to some sqrt(33) eps, and so does each of 20 carries
        assert (a - b).abs().max() <= 20 * 6 * 2 * EPS * b.abs().max()


class KeepsMomentum(Turning):
    """As the paper has it: moments are carried over as they are."""

    def refresh(self, states, grads):
        return [None for _ in super().refresh(states, grads)]


def test_a_momentum_that_is_not_carried_is_noticed() -> None:
    expected = train("sgd-momentum", torch.float32, 20, policy=Dense())
    found = train("sgd-momentum", torch.float32, 20, policy=Dense(), preconditioner=KeepsMomentum())
    assert (found[0] - expected[0]).abs().max() > 0.01


def adam(w, gradient, steps, lr, beta1, beta2, eps, decay):
    """Adam with decoupled decay, in the order of the paper (arXiv 1711.05101)."""
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t in range(1, steps + 1):
        g = gradient(w)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        w = w * (1 - lr * decay) - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
    return w


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adamw_on_a_kronecker_quadratic_is_adam_in_its_eigenbasis(dtype: torch.dtype) -> None:
    """The loss ½ tr(A W B W^T) has the gradient A W B, which is diagonal scaling in the eigenbases of A and B."""
    p, q = rotation(12).double(), rotation(8, 1).double()
    a, b = torch.logspace(-1, 1, 12, dtype=torch.float64), torch.logspace(0, 1, 8, dtype=torch.float64)
    start = torch.randn(12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(dtype).double()
    settings = {"lr": 0.02, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "decay": 0.1}
    expected = adam(p.T @ start @ q, lambda w: a[:, None] * w * b, steps=40, **settings)
    w = torch.nn.Parameter(start.to(dtype))
    base = torch.optim.AdamW([w], lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimizer = SelectiveUpdate(base, preconditioner=FixedRotation())
    for _ in range(40):
        x = w.detach().double()
        w.grad = (p @ (a[:, None] * (p.T @ x @ q) * b) @ q.T).to(dtype)
        optimizer.step()
    found = p.T @ w.detach().double() @ q
    # float32: a unit of rounding a step in p and in g; bfloat16: p and g round by 2^-9, and Adam turns that of g into
    # one of the step's length where g is small
    tolerance = 40 * 4 * EPS if dtype == torch.float32 else 40 * 0.02 * 0.05
    assert (found - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))
    plain = start.clone()
    plain = adam(plain, lambda x: p @ (a[:, None] * (p.T @ x @ q) * b) @ q.T, steps=40, **settings)
    assert (p.T @ plain @ q - expected).abs().max() > 10 * tolerance  # Adam outside of it goes elsewhere


def momentum_outside(optimizer: SelectiveUpdate, p: torch.Tensor, key: str) -> torch.Tensor:
    state = optimizer.state[p]
    return state["selective/basis/P"][0] @ state[key].float() @ state["selective/basis/Q"][0].T


@pytest.mark.parametrize(
    ("name", "key", "options"),
    [
        ("adamw-foreach", "exp_avg", {}),
        ("nadam", "exp_avg", {}),
        ("adafactor", "selective/momentum", {"momentum_beta": 0.9}),
    ],
)
def test_the_carry_leaves_the_momentum_what_it_was(name: str, key: str, options: dict[str, Any]) -> None:
    """With no gradient to mix in, the momentum projected out is the same before and after a refresh."""
    params = parameters(torch.float32)
    base = build(BASES[name], params)
    optimizer = SelectiveUpdate(base, policy=MGUP(), preconditioner=Turning(every=4), **options)
    for step in range(4):
        give_grads(params, step)
        optimizer.step()
    before, basis = momentum_outside(optimizer, params[0], key), optimizer.state[params[0]]["selective/basis/P"].clone()
    inside = optimizer.state[params[0]][key].clone()
    give_grads(params, 4)
    grad = params[0].grad.clone()
    optimizer.step()
    assert not torch.allclose(optimizer.state[params[0]]["selective/basis/P"], basis, atol=0.1)
    after = momentum_outside(optimizer, params[0], key)
    expected = 0.9 * before + 0.1 * grad
    assert (after - expected).abs().max() <= 64 * EPS * expected.abs().max()
    assert (optimizer.state[params[0]][key] - inside).abs().max() > 0.1 * inside.abs().max()  # it was turned


@pytest.mark.parametrize("name", ["adamw-foreach", "nadam", "adafactor", "optimi-adamw"])
@pytest.mark.parametrize("policy", [MGUP(), RotatedLeaning()], ids=["kernel", "own-code"])
def test_the_original_space_is_another_one(name: str, policy: Policy) -> None:
    def run(preconditioner: Any, space: Any) -> torch.Tensor:
        return train(name, torch.float32, 6, policy=policy, preconditioner=preconditioner, mask_space=space)[0]

    same = run(Unrotated(), "original"), run(Unrotated(), "rotated")
    assert (same[0] - same[1]).abs().max() <= 64 * EPS * same[1].abs().max()
    assert (run(FixedRotation(), "original") - run(FixedRotation(), "rotated")).abs().max() > 1e-4


class RotatedRemembers(Policy):
    """Keeps what it was shown."""

    reads = frozenset({"update", "grad", "momentum", "previous_momentum", "param"})

    def init_state(self, view):
        return {name: torch.zeros(view.shape) for name in sorted(self.reads)}

    def mask(self, view):
        state = {name: getattr(view, name).clone() for name in self.reads}
        return torch.where(view.grad > 0, 1.0, 0.5), state


@pytest.mark.parametrize("name", ["adamw-foreach", "adam-maximize", "sgd-dampening", "nadam-coupled", "po-lamb"])
def test_what_a_policy_sees_in_the_two_spaces(name: str) -> None:
    """g, u and m of one space are those of the other, projected out; the parameter is the model's in both."""
    seen = []
    for space in ("rotated", "original"):
        params = parameters(torch.float32)
        optimizer = SelectiveUpdate(
            build(BASES[name], params), policy=RotatedRemembers(), preconditioner=FixedRotation(), mask_space=space
        )
        give_grads(params, 0)
        before = params[0].detach().clone()
        optimizer.step()
        state = {k.removeprefix("selective/state/"): v for k, v in optimizer.state[params[0]].items()}
        assert torch.equal(state["param"], before)
        group, sign = optimizer.param_groups[0], -1 if optimizer.param_groups[0].get("maximize") else 1
        coupled = group["weight_decay"] if " coupled: " in optimizer.explain() else 0.0
        expected = sign * params[0].grad + coupled * before
        mask = torch.where(state["grad"] > 0, 1.0, 0.5)
        if space == "original":
            torch.testing.assert_close(state["grad"], expected, rtol=0, atol=8 * EPS * 4)
        else:
            turned = rotation(12).T @ expected @ rotation(8, 1)
            torch.testing.assert_close(state["grad"], turned, rtol=0, atol=32 * EPS * 4)
        step = mask * state["update"]
        step = step if space == "original" else rotation(12) @ step @ rotation(8, 1).T
        factor = 1.0 if coupled else 1 - group["lr"] * group["weight_decay"]
        torch.testing.assert_close(params[0].detach(), factor * before - step, rtol=0, atol=64 * EPS * 4)
        seen.append(state)
    for key in ("grad", "update", "momentum", "previous_momentum"):
        outside = rotation(12) @ seen[0][key] @ rotation(8, 1).T
        torch.testing.assert_close(outside, seen[1][key], rtol=0, atol=64 * EPS * 4)


@pytest.mark.parametrize("name", ["sgd-momentum", "adamw-foreach", "nadam", "adafactor", "optimi-adamw", "optimi-lion"])
def test_low_precision_rounds_once(name: str) -> None:
    """In bfloat16 a rotated run is no further from float64's plain SGD, or float32's rotated run, than 1.1 × plain."""
    exact = train(name, torch.float32, 20, policy=Dense(), preconditioner=FixedRotation())
    plain_exact = train(name, torch.float32, 20, policy=Dense())
    ours = train(name, torch.bfloat16, 20, policy=Dense(), preconditioner=FixedRotation())
    plain = train(name, torch.bfloat16, 20, policy=Dense())

    def error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
        rotated = (0, 3, 4)
        return sum(float((found[i].float() - expected[i]).square().sum()) for i in rotated) ** 0.5

    # Lion's update is a sign: a rounding of its momentum turns coordinates, here and there by chance
    assert error(ours, exact) <= (2.0 if "lion" in name else 1.25) * error(plain, plain_exact)
