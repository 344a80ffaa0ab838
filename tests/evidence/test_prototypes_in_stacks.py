"""Prototypes that step equal shapes together, against plain loops over matrices in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from evidence.prototypes import orthogonal
from evidence.prototypes.masked_muon import MaskedMuon
from evidence.prototypes.whitened_muon import WhitenedMuon
from torch import Tensor, nn
from torch.optim import Optimizer

from selective.kernels.reference.newton_schulz import newton_schulz_

# The null space of a first gradient has one dimension at most, so that all loops begin with the same basis up to signs.
SHAPES = [(6, 6), (5, 4), (4, 5), (6, 6), (5, 4), (6, 6), (3, 4)]
IN_FIRST_GROUP = 5
STEPS, REFRESH_EVERY = 12, 5  # refreshes in steps 5 and 10
LR, DECAY, MOMENTUM, BETA = 0.1, 0.1, 0.9, 0.9
EPS = 1e-3  # a direction without gradient has rounding noise of 1e-7, which stays small when it is divided by this
MISSING = ((0, 3), (2, 1), (5, 0), (5, 3))  # gradients, by step and matrix: a late one, and ones before a refresh
OPTIONS = {"lr": LR, "weight_decay": DECAY, "momentum": MOMENTUM}
WHITENED = {**OPTIONS, "beta": BETA, "refresh_every": REFRESH_EVERY, "eps": EPS}

Gradients = list[list[Tensor | None]]


def gradients(missing: Sequence[tuple[int, int]] = ()) -> Gradients:
    """Gradients of all steps and matrices, in float64, that float32 can hold. Their singular values are far apart."""
    generator = torch.Generator().manual_seed(3)

    def draw(shape: tuple[int, int]) -> Tensor:
        u, s, vh = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
        return (u * 0.7 ** torch.arange(len(s)) @ vh).float().double()

    drawn = [[draw(shape) for shape in SHAPES] for _ in range(STEPS)]
    return [[None if (t, i) in missing else g for i, g in enumerate(row)] for t, row in enumerate(drawn)]


def optimizer_of(kind: Callable[..., Optimizer], options: dict[str, Any]) -> tuple[list[nn.Parameter], Optimizer]:
    """Parameters of zeros in two groups, and their optimizer."""
    params = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    groups = [{"params": params[:IN_FIRST_GROUP]}, {"params": params[IN_FIRST_GROUP:], "lr": LR / 2}]
    return params, kind(groups, **options)


def step(params: Sequence[nn.Parameter], optimizer: Optimizer, grads: Sequence[Tensor | None]) -> None:
    for p, grad in zip(params, grads, strict=True):
        p.grad = None if grad is None else grad.float()
    optimizer.step()


def orthogonal_of(update: Tensor) -> Tensor:
    x = update / max(float(update.norm()), 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


class Masked:
    """The formulas of MaskedMuon's docstring, for one matrix."""

    def __init__(self, where: str, like: Tensor) -> None:
        self.where, self.m = where, torch.zeros_like(like)

    def update(self, g: Tensor) -> Tensor:
        self.m = MOMENTUM * self.m + (1 - MOMENTUM) * g
        u = MOMENTUM * self.m + (1 - MOMENTUM) * g
        if self.where == "before":
            return orthogonal_of(torch.where(u * g > 0, u, 0.0))
        o = orthogonal_of(u)
        agrees = [bool(row @ of_g > 0) for row, of_g in zip(o, g, strict=True)]
        share = max(0.1, sum(agrees) / len(agrees))
        return torch.stack([row / share if kept else 0 * row for row, kept in zip(o, agrees, strict=True)])


class Whitened:
    """The formulas of WhitenedMuon's docstring, for one matrix."""

    def __init__(self, like: Tensor) -> None:
        self.count, self.m, self.v = 0, torch.zeros_like(like), torch.zeros_like(like)
        self.grams = [torch.zeros(n, n, dtype=like.dtype) for n in like.shape]
        self.bases: list[Tensor] = []

    def update(self, g: Tensor) -> Tensor:
        self.grams = [BETA * a + (1 - BETA) * new for a, new in zip(self.grams, (g @ g.T, g.T @ g), strict=True)]
        if self.count == 0:
            self.bases = [torch.linalg.eigh(a)[1] for a in self.grams]
        elif self.count % REFRESH_EVERY == 0:
            self.bases = [followed(a, q) for a, q in zip(self.grams, self.bases, strict=True)]
        self.count += 1
        self.m = MOMENTUM * self.m + (1 - MOMENTUM) * g
        u = MOMENTUM * self.m + (1 - MOMENTUM) * g
        left, right = self.bases
        p = left.T @ u @ right
        self.v = 0.9 * self.v + 0.1 * p**2
        return orthogonal_of(left @ (p / (self.v.sqrt() + EPS)) @ right.T)


def followed(gram: Tensor, basis: Tensor) -> Tensor:
    """A power step and a QR, in which columns of larger eigenvalues come first, and go back to their places."""
    order = (basis.T @ gram @ basis).diagonal().argsort(descending=True)
    result = torch.empty_like(basis)
    result[:, order] = torch.linalg.qr((gram @ basis)[:, order])[0]
    return result


def looped(rule: Callable[[Tensor], Masked | Whitened], grads: Gradients) -> list[Tensor]:
    """The weights that a rule makes of zeros, matrix by matrix. One without gradient has no step."""
    ends = []
    for i, shape in enumerate(SHAPES):
        weight = torch.zeros(shape, dtype=torch.float64)
        of_matrix, lr = rule(weight), LR if i < IN_FIRST_GROUP else LR / 2
        for grad in (row[i] for row in grads):
            if grad is not None:
                update = of_matrix.update(grad) * max(1.0, shape[0] / shape[1]) ** 0.5
                weight = weight - lr * DECAY * weight - lr * update
        ends.append(weight)
    return ends


CASES = {
    "whitened": (WhitenedMuon, WHITENED, Whitened),
    "masked before": (MaskedMuon, {**OPTIONS, "where": "before"}, partial(Masked, "before")),
    "masked rows": (MaskedMuon, {**OPTIONS, "where": "rows"}, partial(Masked, "rows")),
}


@pytest.mark.parametrize("missing", [(), MISSING], ids=["all", "some missing"])
@pytest.mark.parametrize("case", CASES)
def test_stacks_step_as_a_loop_over_matrices(
    case: str, missing: Sequence[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each matrix, whatever its neighbours do.

    Newton-Schulz is the reference's, in float64, because its rounding to bfloat16 would hide all other errors. What it
    gets is off by float32's eps or so, and it multiplies errors of small singular values by up to 3.4445⁵ = 485. The
    tolerance, 7e-5, is that of all steps added up.
    """
    kind, options, rule = CASES[case]
    monkeypatch.setattr(orthogonal, "newton_schulz_", newton_schulz_)
    grads = gradients(missing)
    params, optimizer = optimizer_of(kind, options)
    for row in grads:
        step(params, optimizer, row)
    tolerance = STEPS * LR * 3.4445**5 * torch.finfo(torch.float32).eps
    for p, expected in zip(params, looped(rule, grads), strict=True):
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_a_matrix_without_gradient_is_left_alone(case: str) -> None:
    """Its weight and all of its state keep their bits in a step in which its neighbours move."""
    kind, options, _ = CASES[case]
    params, optimizer = optimizer_of(kind, options)
    alone, first = 3, 0  # both are (6, 6), in the first group
    for row in gradients(((REFRESH_EVERY, alone),))[: REFRESH_EVERY + 1]:
        weights, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state[params[first]])
        step(params, optimizer, row)
    assert [torch.equal(p, before) for p, before in zip(params, weights, strict=True)] == [
        i == alone for i in range(len(SHAPES))
    ]
    for name, after in optimizer.state[params[first]].items():
        assert len(after) == 2
        assert torch.equal(torch.as_tensor(after[1]), torch.as_tensor(state[name][1])), name
        assert not torch.equal(torch.as_tensor(after[0]), torch.as_tensor(state[name][0])), name


@pytest.mark.parametrize("case", CASES)
def test_newton_schulz_is_called_once_for_each_size(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[tuple[int, ...]]] = []

    def recorded(stacks: Sequence[Tensor], *args: Any, **options: Any) -> None:
        calls.append([tuple(stack.shape) for stack in stacks])
        newton_schulz_(stacks, *args, **options)

    monkeypatch.setattr(orthogonal, "newton_schulz_", recorded)
    kind, options, _ = CASES[case]
    params, optimizer = optimizer_of(kind, options)
    step(params, optimizer, gradients()[0])
    assert calls == [[(2, 6, 6), (1, 6, 6)], [(2, 5, 4), (1, 4, 5)], [(1, 3, 4)]]


@pytest.mark.parametrize("case", CASES)
def test_a_loaded_state_goes_on(case: str) -> None:
    kind, options, _ = CASES[case]
    params, optimizer = optimizer_of(kind, options)
    others, other = optimizer_of(kind, options)
    grads = gradients(MISSING)
    for row in grads[:4]:
        step(params, optimizer, row)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(others, params, strict=True):
        p.data.copy_(q.data)
    for row in grads[4:]:
        step(params, optimizer, row)
        step(others, other, row)
    assert all(torch.equal(p, q) for p, q in zip(others, params, strict=True))


def test_a_gradient_that_is_zero_or_not_finite_spoils_no_neighbour() -> None:
    """A zero gradient makes no update, and no NaN spreads through a stack, neither in the first step nor later."""
    params, optimizer = optimizer_of(WhitenedMuon, {**WHITENED, "weight_decay": 0.0})
    alone, alone_optimizer = optimizer_of(WhitenedMuon, {**WHITENED, "weight_decay": 0.0})
    for row in gradients():
        zero, spoilt = torch.zeros(SHAPES[0]), torch.full(SHAPES[3], torch.nan)
        step(params, optimizer, [zero, *row[1:3], spoilt, *row[4:]])
        step(alone, alone_optimizer, [None, *row[1:3], None, *row[4:]])
    assert torch.equal(params[0], torch.zeros(SHAPES[0]))
    assert params[3].isnan().all()
    for i in (1, 2, 4, 5, 6):
        assert params[i].isfinite().all()
        # 5 shares a batch with the spoilt ones, which may change how bfloat16 rounds: by 1e-2 in all steps, in each run
        torch.testing.assert_close(params[i], alone[i], rtol=0, atol=2e-2)
