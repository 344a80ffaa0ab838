"""Small preconditioners for tests: the identity, a fixed rotation, and one with staggered refreshes from statistics."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from selective.preconditioner import Carry, Preconditioner, Shape


class Unrotated(Preconditioner):
    """The identity: P = Q = I."""

    smallest: int = 1

    def takes(self, shape: Shape) -> bool:
        return min(shape[1:]) >= self.smallest

    def project_in(self, states, xs):
        return [x.clone() for x in xs]

    project_out = project_in


def rotation(n: int, seed: int = 0) -> Tensor:
    """A fixed orthogonal matrix."""
    x = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1000 * seed + n))
    return torch.linalg.qr(x).Q.float()


class FixedRotation(Preconditioner):
    """A rotation that never changes, kept in the state."""

    def init_state(self, like):
        batch, rows, columns = like.shape
        p, q = rotation(rows).to(like.device), rotation(columns, 1).to(like.device)
        return {"P": p.repeat(batch, 1, 1), "Q": q.repeat(batch, 1, 1)}

    def project_in(self, states, xs):
        return [s["P"].mT @ x @ s["Q"] for s, x in zip(states, xs, strict=True)]

    def project_out(self, states, xs):
        return [s["P"] @ x @ s["Q"].mT for s, x in zip(states, xs, strict=True)]


class Rounding(FixedRotation):
    """Rounds to bfloat16 in both directions, and returns the result in float32."""

    def project_in(self, states, xs):
        return [x.bfloat16().float() for x in super().project_in(states, [x.bfloat16().float() for x in xs])]

    def project_out(self, states, xs):
        return [x.bfloat16().float() for x in super().project_out(states, [x.bfloat16().float() for x in xs])]


class Narrow(Rounding):
    """Returns the same numbers as bfloat16 tensors."""

    seen: ClassVar[list[torch.dtype]] = []

    def project_in(self, states, xs):
        return [x.bfloat16() for x in super().project_in(states, xs)]

    def project_out(self, states, xs):
        self.seen.extend(x.dtype for x in xs)
        return [x.bfloat16() for x in super().project_out(states, xs)]


class Turning(FixedRotation):
    """Makes bases from the QR of running Gram matrices, every few steps, one parameter after the other."""

    every: int = 3
    waits: bool = False  # a parameter's first step only makes its basis
    running: bool = True
    permutes: bool = False

    def init_state(self, like):
        batch, rows, columns = like.shape
        left, right = (torch.eye(n, device=like.device).repeat(batch, 1, 1) for n in (rows, columns))
        return {
            "P": left,
            "Q": right,
            "L": left.clone(),
            "R": right.clone(),
            "count": torch.zeros((), dtype=torch.int64, device=like.device),
        }

    def is_due(self, steps, place, count):
        return (self.waits and steps == 0) or steps % self.every == place % self.every

    def stands_still(self, steps):
        return self.waits and steps == 0

    def observes(self):
        return self.running

    def observe(self, states, grads):
        if not self.running:
            return
        for s, g in zip(states, grads, strict=True):
            s["L"].lerp_(g @ g.mT, 0.1)
            s["R"].lerp_(g.mT @ g, 0.1)

    def refresh(self, states, grads):
        made = []
        for s, g in zip(states, grads, strict=True):
            assert bool(torch.isfinite(g).all())  # which the wrapper promises
            left = torch.linalg.qr(s["L"] + g @ g.mT).Q
            right = torch.linalg.qr(s["R"] + g.mT @ g).Q
            rows = columns = None
            if self.permutes:
                rows = torch.arange(g.shape[1], device=g.device).flip(0).repeat(g.shape[0], 1)
                columns = torch.arange(g.shape[2], device=g.device).roll(1).repeat(g.shape[0], 1)
            made.append(Carry(left.mT @ s["P"], s["Q"].mT @ right, rows, columns))
            s["P"].copy_(left)
            s["Q"].copy_(right)
            s["count"].add_(1)
        return made

    def report(self, states):
        return [{"refreshes": s["count"].float()} for s in states]
