"""Zeroing where momentum and gradient disagree can keep Adam from the optimum; attenuating there does not.

The example in one dimension, after the one that MGUP's paper (arXiv 2606.17526) argues with: frequent gradients of -1,
a rare one of +n, start -0.5, optimum -2. Its details are ours, and deterministic: the loss of step t is n x in the last
of every C = 40 steps and -x in the others, on the interval [-2, 2] (after each step x is clamped to it, as in Reddi,
Kale and Kumar 2018). With n = 80 the mean gradient is (80 - 39) / 40 = 1.025 > 0, so the mean loss is least at -2.

Why Cautious fails: after a rare gradient the momentum is positive and decays through zero in some 20 steps; in these
the gradients of -1 disagree with it, so that the moves *down*, which make up most of the way, are thrown away, while
the moves up of the remaining steps all agree. On average, in units of lr a step (from the recursion of the moments
alone): Adam goes down by 0.081, Cautious goes up by 0.008, and with × 2 and × 0.5 it is down by 0.028.
"""

from __future__ import annotations

import pytest
import torch

from selective import MGUP, Cautious, CautiousMGUP, Dense, Policy, SelectiveUpdate

C, N, LOW, HIGH, LR, STEPS = 40, 80.0, -2.0, 2.0, 0.05, 3000


def run(policy: Policy, steps: int = STEPS) -> torch.Tensor:
    """The path of x."""
    x = torch.nn.Parameter(torch.tensor([-0.5], dtype=torch.float64))
    optimizer = SelectiveUpdate(torch.optim.Adam([x], lr=LR), policy=policy, statistics=False)
    path = torch.empty(steps, dtype=torch.float64)
    for t in range(steps):
        x.grad = torch.tensor([N if t % C == C - 1 else -1.0], dtype=torch.float64)
        optimizer.step()
        with torch.no_grad():
            x.clamp_(LOW, HIGH)
        path[t] = x.detach()
    return path


def test_cautious_adam_stays_away_from_the_optimum() -> None:
    path = run(Cautious())
    assert float(path.min()) >= -0.5  # never any nearer than it started
    assert float(path[-C:].min()) > 1.0  # and it ends at the other side


@pytest.mark.parametrize("policy", [Dense(), MGUP(), CautiousMGUP(), CautiousMGUP(alpha=1.5, gamma=0.5)], ids=str)
def test_adam_and_mgup_get_there(policy: Policy) -> None:
    """MGUP of one coordinate has K = 0 and is dense; CautiousMGUP weighs by the signs of Cautious, but not by 0."""
    path = run(policy, STEPS // 2 if isinstance(policy, (Dense, MGUP)) else STEPS)  # those are there sooner
    assert float(path[-C:].min()) == LOW
    # it hovers there: in a period x goes up by at most 39 steps of alpha lr / sqrt(v), v = mean of g^2 = 161
    assert float(path[-C:].max()) < LOW + 39 * 2 * LR / 161**0.5


def test_it_is_the_zero_that_matters() -> None:
    """The same policy with gamma from 0 upwards: the farther from zeroing, the nearer the end of the run to -2."""
    ends = [float(run(CautiousMGUP(alpha=1.0, gamma=gamma), 1000)[-C:].mean()) for gamma in (0.0, 0.25, 0.5, 1.0)]
    assert ends == sorted(ends, reverse=True)
    assert ends[0] > -0.5
    assert ends[-1] < -1.9
