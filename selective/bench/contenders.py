"""What is timed: optimizers, each with the one that says what its result has to be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from selective import (
    MGUP,
    Agreement,
    AlphaConsistency,
    Bernoulli,
    Cautious,
    CautiousMGUP,
    Everything,
    Fixed,
    Grams,
    Magma,
    MeanPreserving,
    NormPreserving,
    Policy,
    SelectiveUpdate,
    TopK,
)

MakeOptimizer = Callable[[Sequence[Parameter]], Optimizer]
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.1}


@dataclass(frozen=True)
class Contender:
    """One optimizer to time. Its `step()` is what is timed, wrapper and all.

    make_optimizer: takes the parameters.
    make_reference: an optimizer that must come to the same result. None: the same optimizer, with everything in
        `selective.kernels` done by the reference implementation.
    """

    name: str
    make_optimizer: MakeOptimizer
    make_reference: MakeOptimizer | None = None


def torch_contenders() -> list[Contender]:
    """torch's AdamW in its three forms, checked against the plain one."""

    def make(**form: Any) -> MakeOptimizer:
        return lambda params: torch.optim.AdamW(params, **ADAMW, **form)

    plain = make(foreach=False)
    return [
        Contender("torch foreach", make(foreach=True), plain),
        Contender("torch fused", make(fused=True), plain),
        Contender("torch single-tensor", plain, plain),
    ]


def _selective(name: str, policy: Policy, statistics: bool) -> Contender:
    def make(params: Sequence[Parameter]) -> Optimizer:
        return SelectiveUpdate(torch.optim.AdamW(params, **ADAMW), policy=policy, statistics=statistics)

    return Contender(name, make)


POLICIES: dict[str, Policy] = {
    "everything × fixed": Policy(selection=Everything(), strength=Fixed(selected=1.0, rest=0.0)),
    "agreement × fixed": CautiousMGUP(),
    "agreement × fixed (Grams)": Grams(),
    "agreement × mean": Cautious(),
    "agreement × norm": Policy(selection=Agreement(), strength=NormPreserving()),
    "previous momentum × norm (AlphaConsistency)": AlphaConsistency(),
    "top-K × fixed": MGUP(),
    "top-K sampled × fixed": Policy(selection=TopK(quantile="sampled"), strength=Fixed(selected=2.0, rest=0.5)),
    "top-K × mean": Policy(selection=TopK(), strength=MeanPreserving()),
    "top-K × norm": Policy(selection=TopK(), strength=NormPreserving()),
    "bernoulli element × fixed": Policy(selection=Bernoulli(), strength=Fixed(selected=2.0, rest=0.0)),
    "bernoulli row × fixed": Policy(selection=Bernoulli(unit="row"), strength=Fixed(selected=2.0, rest=0.0)),
    "bernoulli tensor × alignment (Magma)": Magma(),
}


def selective_contenders(statistics: bool = False) -> list[Contender]:
    """AdamW wrapped, for selections × strengths."""
    ending = " + statistics" if statistics else ""
    return [_selective(name + ending, policy, statistics) for name, policy in POLICIES.items()]


def scratch_contenders() -> list[Contender]:
    """The same around torch's fused step by scratch capture: what a base without a rule of ours pays."""

    def contender(name: str, policy: Policy) -> Contender:
        def make(params: Sequence[Parameter]) -> Optimizer:
            base = torch.optim.AdamW(params, **ADAMW, fused=True)
            return SelectiveUpdate(base, policy=policy, capture="scratch", statistics=False)

        return Contender(f"scratch around fused: {name}", make)

    return [contender(name, POLICIES[name]) for name in ("agreement × fixed", "top-K × fixed")]


def standard_contenders() -> list[Contender]:
    """What the command line times: torch's forms, then every policy without and with statistics, then scratch."""
    return [
        *torch_contenders(),
        *selective_contenders(),
        *selective_contenders(statistics=True),
        *scratch_contenders(),
    ]
