"""The step once more, from docs/reference/kernels.md, in float64 and Python, without any code of the kernels."""

from __future__ import annotations

import math

import torch

F64 = torch.float64


def _mix64(x: int) -> int:
    m = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & m
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & m
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & m
    return x ^ (x >> 31)


def _lowbias32(x: int) -> int:
    m = 0xFFFFFFFF
    x ^= x >> 16
    x = (x * 0x7FEB352D) & m
    x ^= x >> 15
    x = (x * 0x846CA68B) & m
    return x ^ (x >> 16)


def hash32(seed: int, step: int, address: int, index: int) -> int:
    """The 32-bit hash of one index."""
    state = 0
    for word in (seed, step, address, 0, index >> 32):
        state = _mix64(state ^ (word & (2**64 - 1)))
    x = index & 0xFFFFFFFF
    for key in (state >> 32, state & 0xFFFFFFFF):
        x = _lowbias32(x ^ key)
    return x


def bits(seed: int, step: int, address: int, index: int) -> int:
    """The 24-bit number of one element."""
    return hash32(seed, step, address, index) >> 8


def ranking_bits(seed: int, step: int, address: int, index: int) -> int:
    """The 24-bit number of one element by which a matched control ranks it."""
    group, place = divmod(index, 4)
    x = hash32(seed, step, address, group)
    lower = _lowbias32(x ^ ((place + 1) * 0x9E3779B9 & 0xFFFFFFFF))
    return (x >> 8 * place & 255) << 16 | lower >> 16


def largest(scores: list[float], k: int) -> list[bool]:
    """Exactly the k largest: zeros equal, ties to the lower index, NaN never."""
    order = sorted((i for i, s in enumerate(scores) if not math.isnan(s)), key=lambda i: -scores[i])  # stable
    chosen = set(order[: max(k, 0)])
    return [i in chosen for i in range(len(scores))]


def advance(rule, p, g, state):
    """New state, and (g, u, m, previous m), all float64, for a rule as `selective.kernels` names it."""
    kind = type(rule).__name__
    s = {k: v.to(F64).clone() for k, v in state.items() if v is not None}
    g = g.to(F64).clone()
    if kind == "GivenRule":
        u = -s["update"] if rule.negated else s["update"]
        return s, (g, u, s.get("momentum"), s.get("previous_momentum"))
    if rule.maximize:
        g = -g
    if rule.weight_decay and not getattr(rule, "decoupled", False):
        g = g + rule.weight_decay * p.to(F64)
    lr = float(rule.lr)
    if kind == "AdamRule":
        b1, b2, t = float(rule.beta1), float(rule.beta2), float(s["step"]) + 1
        previous = s["exp_avg"]
        m = b1 * previous + (1 - b1) * g
        v = b2 * s["exp_avg_sq"] + (1 - b2) * g * g
        s.update(step=torch.tensor(t, dtype=F64), exp_avg=m, exp_avg_sq=v)
        if rule.amsgrad:
            v = s["max_exp_avg_sq"] = torch.maximum(s["max_exp_avg_sq"], v)
        return s, (g, lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + rule.eps), m, previous)
    if kind == "SGDRule":
        if rule.momentum == 0:
            return s, (g, lr * g, None, None)
        previous = s.get("momentum_buffer")
        m = g if previous is None else rule.momentum * previous + (1 - rule.dampening) * g
        s["momentum_buffer"] = m
        return s, (
            g,
            lr * (g + rule.momentum * m if rule.nesterov else m),
            m,
            torch.zeros_like(g) if previous is None else previous,
        )
    b1, b2, previous = float(rule.beta1), float(rule.beta2), s["exp_avg"]
    s["exp_avg"] = b2 * previous + (1 - b2) * g
    return s, (g, lr * (b1 * previous + (1 - b1) * g).sign(), s["exp_avg"], previous)


def _nesterov(rule, m, g):
    kind = type(rule).__name__
    if kind == "SGDRule":
        return g + rule.momentum * m
    beta = {"AdamRule": "beta1", "LionRule": "beta2", "GivenRule": "momentum_beta"}[kind]
    beta = float(getattr(rule, beta))
    return (1 - beta) * g + beta * m


def select(selection, rule, moved, draw, address):
    """Booleans shaped like the parameter, and whether the tensor is dense."""
    g, u, m, previous = moved
    d = g.numel()
    if selection.kind == "everything":
        return torch.ones(g.shape, dtype=torch.bool), False
    if selection.kind == "agreement":
        x = {"update": u, "momentum": m, "previous_momentum": previous}[selection.product]
        if selection.product == "previous_momentum" and not (x != 0).any():
            return torch.ones(g.shape, dtype=torch.bool), False
        return (x * g > 0 if selection.strict else x * g >= 0), False
    if selection.kind == "top_k":
        k = int(selection.fraction * d)
        x = u if selection.score == "update" else m if selection.score == "momentum" else _nesterov(rule, m, g)
        return torch.tensor(largest((x * g).reshape(-1).tolist(), k), dtype=torch.bool).reshape(g.shape), k == 0
    limit = round(selection.probability * 2**24)
    rows = g.shape[0] if g.dim() else 1
    each = {"element": 1, "row": max(d // max(rows, 1), 1), "tensor": max(d, 1)}[selection.unit]
    flat = [bits(draw.seed, draw.step, address, i // each) < limit for i in range(d)]
    return torch.tensor(flat, dtype=torch.bool).reshape(g.shape), False


def multipliers(strength, selected, moved, average):
    """The two multipliers, and the alignment's average."""
    g, u, m, _ = moved
    if strength.kind == "fixed":
        return strength.selected, strength.rest, average
    if strength.kind == "mean_preserving":
        share = float(selected.sum()) / max(selected.numel(), 1)
        a = min(strength.cap, (1 - strength.rest * (1 - share)) / share) if share else 1.0
        return a, strength.rest, average
    if strength.kind == "norm_preserving":
        x = {"update": u, "momentum": m, "gradient": g}[strength.of]
        whole, chosen = float((x * x).sum()), float((x * x)[selected].sum())
        a = math.sqrt(max(0.0, whole - strength.rest**2 * (whole - chosen)) / chosen) if chosen else 1.0
        return min(strength.cap, a), strength.rest, average
    norms = float(m.norm() * g.norm())
    cosine = float((m * g).sum()) / norms if norms else 0.0
    new = strength.smoothing * average + (1 - strength.smoothing) / (1 + math.exp(-cosine / strength.temperature))
    return new, strength.rest, new


def step(rule, selection, strength, draw, p, g, state, address, average=1.0):
    """One tensor's whole step: the new parameter, the new state, and what `Sums` reports."""
    s, moved = advance(rule, p, g, state)
    selected, dense = select(selection, rule, moved, draw, address)
    above, below, average = multipliers(strength, selected, moved, average)
    if dense:
        above = below = 1.0
        selected = torch.ones_like(selected)
    u = moved[1]
    mask = torch.where(selected, torch.tensor(above, dtype=F64), torch.tensor(below, dtype=F64))
    if strength.still and not dense:
        mask[u * moved[0] == 0] = 0
    if type(rule).__name__ == "GivenRule":
        new = rule.factor * s["start"] + (rule.offset - mask) * u
    else:
        factor = float(getattr(rule, "decay_factor", 1.0))
        if getattr(rule, "decoupled", False):
            factor = 1 - float(rule.lr) * rule.weight_decay
        new = factor * p.to(F64) - mask * u
    sums = {
        "selected": float(selected.sum()), "strength_selected": above, "strength_rest": below,
        "update_sq": float((u * u).sum()), "grad_sq": float((moved[0] ** 2).sum()),
        "update_grad": float((u * moved[0]).sum()), "masked_sq": float(((mask * u) ** 2).sum()),
    }  # fmt: skip
    return new, s, sums, average
