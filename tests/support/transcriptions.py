"""The rules of all named policies, transcribed in float64 from the formulas of the papers.

If a paper could not be read, the rule is the reading that the policy's docstring states. Nothing of the library is
imported here. A rule maps a base's move to the multiplier of each coordinate, and returns the margin of its decisions:
the smallest distance of a coordinate from the threshold, in units of the sizes to which rounding errors are relative.
A float32 run may decide differently only if the margin is a few eps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transcribed_bases import F64, Move

Coin = Callable[[str], Tensor]  # "element", "row" or "tensor" -> uniform numbers of this tensor and step


class Ruled(NamedTuple):
    mask: Tensor
    margin: float = math.inf


Rule = Callable[[Move, Coin, dict[str, Tensor]], Ruled]


def _sign_margin(x: Tensor, size: Tensor, move: Move) -> float:
    """The distance of x and the gradient from zero. If a size is 0, the number is exactly 0 in any precision."""
    nearest = (torch.where(s > 0, a.abs() / s, math.inf).min() for a, s in ((x, size), (move.grad, move.grad_size)))
    return min(float(n) for n in nearest)


def _top(score: Tensor, size: Tensor, count: int) -> tuple[Tensor, float]:
    """The `count` largest, the lower index first among equals, and the margin by which the others were left out."""
    flat, sizes = score.flatten(), size.flatten()
    values = flat.tolist()
    order = sorted(range(flat.numel()), key=lambda i: (-values[i], i))
    chosen = torch.zeros(flat.numel(), dtype=torch.bool)
    chosen[order[:count]] = True
    if count == flat.numel():
        return chosen.reshape(score.shape), math.inf
    middle = (flat[order[count - 1]] + flat[order[count]]) / 2
    margin = float(((flat - middle).abs() / (sizes + middle.abs())).min())
    return chosen.reshape(score.shape), margin


def _two(selected: Tensor, a: float, b: float) -> Tensor:
    return torch.where(selected, torch.tensor(a, dtype=F64), torch.tensor(b, dtype=F64))


def dense(move: Move, coin: Coin, state: dict[str, Tensor]) -> Ruled:
    return Ruled(torch.ones_like(move.update))


def alpha_consistency(of: str = "momentum", rest: float = 0.0, cap: float = 2.0, current: bool = False) -> Rule:
    """phi = 1[m_{t-1} g > 0], alpha = min(cap, |m_t| / |phi m_t|), update alpha phi u; dense where m_{t-1} = 0.

    The other readings take the norm of the update or the gradient, or a mean of 1 (`of="mean"`). With `rest` for the
    others, alpha is such that the norm (or mean) of the whole stays the same.
    """

    def rule(move: Move, coin: Coin, state: dict[str, Tensor]) -> Ruled:
        historical, size = (move.momentum, move.momentum_size) if current else (move.previous, move.previous.abs())
        everywhere = not current and not historical.any()
        phi = torch.ones_like(historical, dtype=torch.bool) if everywhere else historical * move.grad > 0
        if of == "mean":
            kept, other, power = float(phi.sum()), float((~phi).sum()), 1.0
        else:
            x = {"momentum": move.momentum, "update": move.update, "gradient": move.grad}[of].square()
            kept, other, power = float(x[phi].sum()), float(x[~phi].sum()), 2.0
        wanted = max(0.0, kept + other - rest**power * other)
        alpha = min(cap, (wanted / kept) ** (1 / power)) if kept > 0 else 1.0
        margin = math.inf if everywhere else _sign_margin(historical, size, move)
        return Ruled(_two(phi, alpha, rest), margin)

    return rule


def mgup(tau: float = 0.5, alpha: float | None = None, gamma: float | None = None, score: str = "update") -> Rule:
    """The K = floor(tau d) largest signed scores get 1/tau, the rest tau; K = 0 leaves the tensor dense."""

    def rule(move: Move, coin: Coin, state: dict[str, Tensor]) -> Ruled:
        x, size = {
            "update": (move.update, move.size),
            "momentum": (move.momentum, move.momentum_size),
            "nesterov": (move.nesterov, move.momentum_size + move.grad_size),
        }[score]
        count = math.floor(tau * x.numel())
        if count == 0:
            return Ruled(torch.ones_like(x))
        top, margin = _top(x * move.grad, size * move.grad_size, count)
        return Ruled(_two(top, 1 / tau if alpha is None else alpha, tau if gamma is None else gamma), margin)

    return rule


def cautious_mgup(tau: float = 0.5) -> Rule:
    """alpha = 1/tau where u g >= 0 (the official code's), gamma = tau elsewhere."""

    def rule(move: Move, coin: Coin, state: dict[str, Tensor]) -> Ruled:
        product = move.update * move.grad
        return Ruled(_two(product >= 0, 1 / tau, tau), _sign_margin(move.update, move.size, move))

    return rule


def cautious(cap: float = 10.0) -> Rule:
    """u phi / mean(phi), phi = 1[u g > 0]; the scale bounded by `cap` (the paper bounds the mean)."""

    def rule(move: Move, coin: Coin, state: dict[str, Tensor]) -> Ruled:
        product = move.update * move.grad
        phi = (product > 0).to(F64)
        share = float(phi.mean())
        scale = min(cap, 1 / share) if share > 0 else 1.0
        return Ruled(phi * scale, _sign_margin(move.update, move.size, move))

    return rule


def grams(move: Move, coin: Coin, state: dict[str, Tensor]) -> Ruled:
    """The step is sign(g) |u|: as a multiplier of u, for gradients that are not 0."""
    wanted = move.grad.sign() * move.update.abs()
    mask = torch.where(move.update != 0, wanted / move.update, torch.ones_like(wanted))
    return Ruled(mask, _sign_margin(move.update, move.size, move))


def magma(probability: float = 0.5, temperature: float = 2.0, smoothing: float = 0.9) -> Rule:
    """A coin for the tensor; kept: s, s = 0.9 s + 0.1 sigmoid(cos(m, g) / 2), from 1. s is stored in float32."""

    def rule(move: Move, coin: Coin, state: dict[str, Tensor]) -> Ruled:
        norms = move.momentum.norm() * move.grad.norm()
        cosine = (move.momentum * move.grad).sum() / norms if norms > 0 else torch.zeros((), dtype=F64)
        average = state.get("average", torch.ones((), dtype=F64))
        new = smoothing * average + (1 - smoothing) * torch.sigmoid(cosine / temperature)
        state["average"] = new.to(torch.float32).to(F64)
        kept = float(coin("tensor")) < probability
        return Ruled(torch.ones_like(move.update) * (float(new) if kept else 0.0))

    return rule


def skip_update(probability: float = 0.5) -> Rule:
    """A coin for the tensor; kept: 1 / probability."""
    return lambda move, coin, state: Ruled(
        torch.ones_like(move.update) * (1 / probability if float(coin("tensor")) < probability else 0.0)
    )


def random_mask(probability: float = 0.5, unit: str = "element") -> Rule:
    """A coin for each coordinate or row, × 1 / probability."""
    return lambda move, coin, state: Ruled(
        _two((coin(unit) < probability).expand(move.update.shape), 1 / probability, 0.0)
    )
