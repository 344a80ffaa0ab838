"""What kind of weight decay a base has, and which formula its factor follows."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.capture.anatomy_decay import RULES
from selective.capture.anatomy_facts import Anatomy
from selective.capture.anatomy_probe import LR, Run
from selective.capture.anatomy_prober import DECAY, ROUNDING, Prober, largest


def with_decay(prober: Prober, facts: Anatomy, without: Run) -> Anatomy:
    """`facts` with what decay does, by comparison with `without`, the run from the large values without any."""
    if not isinstance(prober.group.get("weight_decay"), (int, float, Tensor)):
        return facts
    decayed = prober.run(prober.large, decay=DECAY)
    effect = _apart(decayed, without)
    size = max(largest(p) for p in decayed.params[-1])
    if effect <= ROUNDING * prober.eps(decayed) * size:
        return facts
    for sign in (-1.0, 1.0) if prober.maximize else (1.0, -1.0):
        by_hand = prober.run(prober.large, lambda t, i, p, s=sign: prober.grads(t, i, p) + s * DECAY * p)
        if _apart(decayed, by_hand) < 0.01 * effect:  # the same: rounding; another rule: of the size of the effect
            return replace(facts, decay="coupled", decay_sign=sign)
    factors = Factors(prober, facts.depends_on_param)
    if not factors.uniform:
        return replace(facts, decay="inside")
    return replace(facts, decay="decoupled", decay_rule=factors.rule())


def _apart(one: Run, other: Run) -> float:
    """The norm over all stand-ins and steps of how far two runs are from each other; NaN counts as far."""
    total = sum(float((a - b).square().sum()) for a, b in zip(chain(*one.params), chain(*other.params), strict=True))
    return float("inf") if total != total else total**0.5


class Factors:
    """Factor by step and stand-in over a grid of lr and weight_decay, beside what each formula says.

    Where the update does not look at the parameter, decayed runs from p and from 0 differ by factor·p, in the
    presence of gradients. Where it does, gradients are zero, so that nothing but decay is left.
    """

    def __init__(self, prober: Prober, depends: bool) -> None:
        self.rows: list[tuple[float, float, dict[str, float]]] = []  # measured, its error, by formula
        self.uniform = True
        by_decay: dict[tuple[float, float], float] = {}
        for lr in (LR, 2 * LR):
            for decay in (DECAY / 4, DECAY / 2):
                by_decay[lr, decay] = self._one(prober, depends, lr, decay)
        if depends:  # LAMB with decay in the trust ratio: all of the step is decay, however little of it was asked for
            for lr in (LR, 2 * LR):
                low, high = by_decay[lr, DECAY / 4], by_decay[lr, DECAY / 2]
                self.uniform &= low != 0 and abs(high / low - 2) < 0.1

    def _one(self, prober: Prober, depends: bool, lr: float, decay: float) -> float:
        said: list[list[dict[str, float]]] = []

        def ask(twin: Optimizer, params: list[Tensor]) -> None:
            said.append([_by_formula(twin, p) for p in params])

        if depends:
            moving = prober.run(
                prober.large, lambda t, i, p: torch.zeros_like(p), decay=decay, lr=lr, steps=4, before=ask
            )
            still = Run(params=[[torch.zeros_like(p) for p in ps] for ps in moving.params])
        else:
            moving = prober.run(prober.large, decay=decay, lr=lr, steps=4, before=ask)
            still = prober.run(prober.zeros, decay=decay, lr=lr, steps=4)
        eps, last = prober.eps(moving), 0.0
        for t, formulas in enumerate(said):
            for i, by_formula in enumerate(formulas):
                x = moving.params[t][i] - still.params[t][i]
                y = moving.params[t + 1][i] - still.params[t + 1][i]
                factor = float(x @ y) / float(x @ x)
                error = ROUNDING * eps * max(1.0, largest(y) / max(largest(x), 1e-300))
                worst = largest(y - factor * x)
                self.uniform &= worst <= (1e-6 * abs(1 - factor) + error) * largest(x)
                self.rows.append((factor, error, by_formula))
                last = factor - 1
        return last

    def rule(self) -> str:
        for name in RULES:
            if all(name in said and abs(f - said[name]) <= 1e-4 * abs(1 - f) + e for f, e, said in self.rows):
                return name
        return "measured"


def _by_formula(twin: Optimizer, param: Tensor) -> dict[str, float]:
    said = {}
    for name, rule in RULES.items():
        try:
            said[name] = float(rule(twin, twin.param_groups[0], param))
        except (KeyError, TypeError, AttributeError, ZeroDivisionError):
            continue  # the group has not what this formula asks for (lr is None, no max_lr)
    return said
