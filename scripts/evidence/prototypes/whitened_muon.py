"""WhitenedMuon: Muon, whose momentum is divided by the root of its second moment in Soap's basis before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from evidence.prototypes.eigenbases import Side, renew
from evidence.prototypes.orthogonal import nesterov, orthogonalise_, subtract
from evidence.prototypes.stacks import Stack, stacks_of
from selective.preconditioner.solvers import SolverName

DECAY_OF_SQUARES = 0.9


class WhitenedMuon(Optimizer):
    """Muon over matrices, with a whitening before the orthogonalisation.

        P = QLᵀ u QR;  v = 0.9 v + 0.1 P²;  s = QL (P / √v) QRᵀ;  W -= lr · NewtonSchulz(s)

    u is Nesterov's momentum. QL and QR are the eigenbases of running Gram matrices, one of each side. They follow them
    by a power step and a QR every `refresh_every` steps, in which columns of larger eigenvalues come first, and go back
    to their places afterwards. Decay, scale and momentum are those of torch's Muon. It is the rule of a public run of
    GPT-2 124M.

    Matrices of one shape are stepped in a stack. Each counts its own steps.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        beta: float = 0.95,
        refresh_every: int = 10,
        eps: float = 1e-8,
    ) -> None:
        options = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "beta": beta, "eps": eps}
        super().__init__(params, {**options, "refresh_every": refresh_every})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is None
        works = [_Work(stack) for stack in stacks_of(self)]
        renew([side for work in works for side in work.due()])
        updates = [work.whitened() for work in works]
        orthogonalise_(updates)
        for work, update in zip(works, updates, strict=True):
            subtract(work.stack, update)


class _Work:
    """The step of one stack until the orthogonalisation. The averages of the Gram matrices move at once."""

    def __init__(self, stack: Stack) -> None:
        self.stack, grads = stack, stack.grads
        if not stack.state:
            _start(stack)
        self.taken = stack.taken()
        self.steps: list[int] = stack.state["steps"]  # of each matrix of the stack, until this step
        beta = stack.group["beta"]
        for side, x in (("left", grads), ("right", grads.mT)):
            self.taken[side].baddbmm_(x, x.mT, beta=beta, alpha=1 - beta)

    def due(self) -> list[Side]:
        """The sides that get new bases in this step."""
        sides = []
        done = [self.steps[number] for number in self.stack.numbers]
        begin = [i for i, steps in enumerate(done) if steps == 0]
        follow = [i for i, steps in enumerate(done) if steps and steps % self.stack.group["refresh_every"] == 0]
        by_solver: dict[SolverName, list[int]] = {"eigh": begin, "cholesky": follow}
        for solver, where in by_solver.items():
            if where:
                sides += [Side(self.taken[s], self.taken[f"basis of {s}"], where, solver) for s in ("left", "right")]
        return sides

    def whitened(self) -> Tensor:
        """Nesterov's momentum, whitened. All that was taken is put back."""
        stack, taken = self.stack, self.taken
        update = nesterov(stack.grads, taken["m"], stack.group["momentum"])
        left, right = taken["basis of left"], taken["basis of right"]
        rotated = left.mT @ update @ right
        taken["v"].mul_(DECAY_OF_SQUARES).addcmul_(rotated, rotated, value=1 - DECAY_OF_SQUARES)
        stack.put_back(taken)
        for number in stack.numbers:
            self.steps[number] += 1
        return left @ rotated.div_(taken["v"].sqrt().add_(stack.group["eps"])) @ right.mT


def _start(stack: Stack) -> None:
    rows, columns = stack.grads.shape[1:]
    stack.state |= {"steps": [0] * stack.count, "m": stack.zeros(rows, columns), "v": stack.zeros(rows, columns)}
    for side, n in (("left", rows), ("right", columns)):
        stack.state |= {side: stack.zeros(n, n), f"basis of {side}": stack.zeros(n, n)}
        stack.state[f"basis of {side}"].diagonal(dim1=1, dim2=2).fill_(1)  # it stays if the first gradient is zero
