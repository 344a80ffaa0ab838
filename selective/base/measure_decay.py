"""What kind of weight decay a base has, and which formula its factor follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.decay import FORMULAS, measured_factor
from selective.base.facts import BaseFacts
from selective.base.probe import DECAY, LR, ROUNDING, Grads, Prober, Run, largest


def with_decay(prober: Prober, facts: BaseFacts, without: Run) -> BaseFacts:
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
    rule = Factors(prober, facts.depends_on_param).rule()
    if rule is None:
        return replace(facts, decay="inside")
    return replace(facts, decay="decoupled", decay_rule=rule)


def _apart(one: Run, other: Run) -> float:
    """The norm over all stand-ins and steps of how far two runs are from each other; NaN counts as far."""
    total = sum(float((a - b).square().sum()) for a, b in zip(chain(*one.params), chain(*other.params), strict=True))
    return float("inf") if total != total else total**0.5


Said = dict[str, float]  # the factor of the step that comes next, by formula
Ask = Callable[[Optimizer, Tensor], Said]
Row = tuple[float, float, Said]  # a factor as observed, its error, and what was said before the step


class Factors:
    """Factor by step and stand-in over a grid of lr and weight_decay, beside what each formula says.

    Where the update does not look at the parameter, decayed runs from p and from 0 differ by factor·p, in the
    presence of gradients. Where it does, gradients are zero, so that nothing but decay is left.
    """

    def __init__(self, prober: Prober, depends: bool) -> None:
        self.prober, self.depends = prober, depends
        self.rows: list[Row] = []
        self.uniform = True
        by_decay: dict[tuple[float, float], float] = {}
        for lr in (LR, 2 * LR):
            for decay in (DECAY / 4, DECAY / 2):
                rows = self._observed(lr, decay, _by_formula)
                by_decay[lr, decay] = rows[-1][0] - 1
                self.rows += rows
        if depends:  # LAMB with decay in the trust ratio: all of the step is decay, however little of it was asked for
            for lr in (LR, 2 * LR):
                low, high = by_decay[lr, DECAY / 4], by_decay[lr, DECAY / 2]
                self.uniform &= low != 0 and abs(high / low - 2) < 0.1

    def rule(self) -> str | None:
        """What tells the factor before a step: a formula, or "measured"; None where nothing does.

        A factor by itself is not yet decoupled decay. Where decay goes into a momentum (NovoGrad adds it to the
        gradient that it has normalised), what it does to the parameter is a factor in each step, too; but part of it
        comes from the decay of earlier steps, which no single step from the state at hand shows, and which does not
        get into the state of a base that steps zeros. So a measurement has to foretell what is observed, as formulas.
        """
        if not self.uniform:
            return None
        found = next((name for name in FORMULAS if _foretells(name, self.rows)), None)
        if found is not None:
            return found
        rows = self._observed(LR, DECAY / 2, self._by_measurement, others=True)
        if self.depends:  # decay by another name (MARS has one for vectors) moves parameters too, and is not measured
            idle = self._observed(LR, 0.0, lambda clone, p: {}, others=True)
            rows = [(f - (g - 1), e, said) for (f, e, said), (g, _, _) in zip(rows, idle, strict=True)]
        return "measured" if self.uniform and _foretells("measured", rows) else None

    def _by_measurement(self, clone: Optimizer, param: Tensor) -> Said:
        try:
            return {"measured": measured_factor(clone, clone.param_groups[0], param, self.depends)}
        except Exception:  # a foreign step, on a state of a foreign kind; it can't be measured in training either
            return {}

    def _observed(self, lr: float, decay: float, ask: Ask, others: bool = False) -> list[Row]:
        """The factors of four steps. With `others`, stand-ins of other values and larger gradients step beside the
        usual ones: what is measured on one parameter must not be moved by its neighbours (it is in AdamS)."""
        prober, said = self.prober, list[list[Said]]()
        starts = [*prober.large, *prober.small] if others else prober.large
        usual = len(prober.large)

        def before(clone: Optimizer, params: list[Tensor]) -> None:
            said.append([ask(clone, p) for p in params])

        grads: Grads = lambda t, i, p: prober.grads(t, i % usual, p) * 8.0 ** (i // usual)  # noqa: E731
        if self.depends:
            nothing: Grads = lambda t, i, p: torch.zeros_like(p)  # noqa: E731
            moving = prober.run(starts, nothing, decay=decay, lr=lr, steps=4, before=before)
            still = Run(params=[[torch.zeros_like(p) for p in ps] for ps in moving.params])
        else:
            moving = prober.run(starts, grads, decay=decay, lr=lr, steps=4, before=before)
            still = prober.run([torch.zeros_like(p) for p in starts], grads, decay=decay, lr=lr, steps=4)
        eps, rows = prober.eps(moving), list[Row]()
        for t, formulas in enumerate(said):
            for i, by_formula in enumerate(formulas):
                x = moving.params[t][i] - still.params[t][i]
                y = moving.params[t + 1][i] - still.params[t + 1][i]
                factor = float(x @ y) / float(x @ x)
                error = ROUNDING * eps * max(1.0, largest(y) / max(largest(x), 1e-300))
                worst = largest(y - factor * x)
                self.uniform &= worst <= (1e-6 * abs(1 - factor) + error) * largest(x)
                rows.append((factor, error, by_formula))
        return rows


def _foretells(name: str, rows: list[Row]) -> bool:
    return all(name in said and abs(f - said[name]) <= 1e-4 * abs(1 - f) + e for f, e, said in rows)


def _by_formula(clone: Optimizer, param: Tensor) -> Said:
    said = {}
    for name, rule in FORMULAS.items():
        try:
            said[name] = float(rule(clone, clone.param_groups[0], param))
        except (KeyError, TypeError, AttributeError, ZeroDivisionError):
            continue  # the group has not what this formula asks for (lr is None, no max_lr)
    return said
