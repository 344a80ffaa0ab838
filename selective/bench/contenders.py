"""The optimizers that are timed, each with a reference for its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from selective import (
    MGUP,
    Agreement,
    AlphaConsistency,
    Bernoulli,
    Cautious,
    CautiousDecay,
    CautiousMGUP,
    Everything,
    Fixed,
    Grams,
    Magma,
    MeanPreserving,
    NormPreserving,
    Policy,
    RandomMask,
    SelectiveUpdate,
    TopK,
)
from selective.bench.promised import Promise, promised_bytes

MakeOptimizer = Callable[[Sequence[Any]], Optimizer]  # takes parameters or groups of them
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


class NotPossible(ValueError):
    """Raised by a contender that can't be made of these parameters, or not yet. The message says why."""


@dataclass(frozen=True)
class Contender:
    """One optimizer to time. The time is that of its whole `step()`, wrapper included.

    make_optimizer: takes the parameters, or their groups.
    make_reference: makes an optimizer that must give the same result. None: the same optimizer, on the reference
        implementation of `selective.kernels`.
    agrees: the required agreement. "same" is up to rounding. "near" is up to `allowed` of the parameters' movement,
        for other people's AdamW. "own" is a rule of its own, which only has to move every parameter and to stay finite.
    allowed: the share of the parameters' movement by which results may differ that have to be "near".
    policy: the policy whose bytes are promised; None for AdamW's.
    state_bytes: the bytes of one element of a moment, if it is not in the parameters' dtype.
    missing: the reason why it can't be made here.
    """

    name: str
    make_optimizer: MakeOptimizer
    make_reference: MakeOptimizer | None = None
    agrees: Literal["same", "near", "own"] = "same"
    policy: Policy | None = None
    state_bytes: float | None = None
    missing: str | None = None
    allowed: float = 1e-3  # more than the place of eps and the debiasing of moments change

    def promise(self, dtype: torch.dtype = torch.float32) -> Promise:
        return promised_bytes(self.policy, dtype, self.state_bytes)


def adamw(**form: Any) -> MakeOptimizer:
    """A function that makes torch's AdamW in one of its forms."""
    return lambda params: torch.optim.AdamW(params, **ADAMW, **form)


def torch_contenders(dtype: torch.dtype = torch.float32) -> list[Contender]:
    """torch's AdamW in its three forms, checked against the plain one.

    In bfloat16 and float16 the forms round intermediate results differently, and only have to be near each other.
    """
    agrees: Literal["same", "near"] = "same" if dtype == torch.float32 else "near"
    forms = {"foreach": {"foreach": True}, "fused": {"fused": True}, "single-tensor": {"foreach": False}}
    return [Contender(f"torch {name}", adamw(**form), adamw(foreach=False), agrees) for name, form in forms.items()]


POLICIES: dict[str, Policy] = {
    "Everything × Fixed": Policy(selection=Everything(), strength=Fixed(selected=1.0, rest=0.0)),  # dense
    "CautiousMGUP": CautiousMGUP(),
    "Grams": Grams(),
    "RandomMask": RandomMask(),
    "RandomMask (row)": RandomMask(unit="row"),
    "MGUP": MGUP(),
    "MGUP (sampled)": MGUP(quantile="sampled"),
    "Cautious": Cautious(),
    "Cautious (sampled)": Cautious(estimate="sampled"),
    "AlphaConsistency": AlphaConsistency(),
    "AlphaConsistency (sampled)": AlphaConsistency(
        strength=NormPreserving(of="momentum", cap=2.0, rest=0.0, estimate="sampled")
    ),
    "Agreement × NormPreserving": Policy(selection=Agreement(), strength=NormPreserving()),
    "TopK × MeanPreserving": Policy(selection=TopK(), strength=MeanPreserving()),
    "TopK × NormPreserving": Policy(selection=TopK(), strength=NormPreserving()),
    "Magma": Magma(),
}


def wrapped(name: str, policy: Policy, base: MakeOptimizer, **options: Any) -> Contender:
    """A base in `SelectiveUpdate` with these options, checked against the same on the reference implementation."""

    def make(params: Sequence[Any]) -> Optimizer:
        return SelectiveUpdate(base(params), policy=policy, **options)

    return Contender(name, make, policy=policy)


def selective_contenders(device: str = "cpu", statistics: bool = False) -> list[Contender]:
    """Wrapped AdamW, for selections × strengths: the default AdamW on a CPU, the fused one on CUDA.

    Without `statistics` also two with selective decay, which reads and writes what the same step does without it.
    On CUDA the fused one counts its steps on the device, as its kernels do.
    """
    ending = " + statistics" if statistics else ""
    base = adamw(fused=True) if device == "cuda" else adamw()
    contenders = [wrapped(name + ending, policy, base, statistics=statistics) for name, policy in POLICIES.items()]
    if not statistics:  # a dense group has none
        decay = CautiousDecay()
        contenders += [
            wrapped("CautiousDecay", POLICIES["Everything × Fixed"], base, statistics=False, decay=decay),
            wrapped("CautiousDecay, MGUP", POLICIES["MGUP"], base, statistics=False, decay=decay),
        ]
    return contenders


def control_contenders(statistics: bool = False) -> list[Contender]:
    """The matched random control of each policy, on a CPU: "control of MGUP". Random and dense policies have none."""
    ending = " + statistics" if statistics else ""
    return [
        wrapped(f"control of {name}{ending}", RandomMask.matching(policy), adamw(), statistics=statistics)
        for name, policy in POLICIES.items()
        if not isinstance((policy.parts() or (None,))[0], Everything | Bernoulli)
    ]


def other_bases(device: str = "cpu") -> list[Contender]:
    """Scratch capture around torch's fused step: the cost for a base whose rule our kernels don't have.

    On CUDA also the default AdamW, which counts its steps on the host.
    """
    contenders = [
        wrapped(f"{name}, scratch around fused", POLICIES[name], adamw(fused=True), capture="scratch", statistics=False)
        for name in ("CautiousMGUP", "MGUP")
    ]
    if device == "cuda":
        contenders.append(wrapped("CautiousMGUP, default AdamW", POLICIES["CautiousMGUP"], adamw(), statistics=False))
    return contenders


def standard_contenders(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Contender]:
    """The contenders of the command line: torch's forms, every policy without and with statistics, other optimizers."""
    return [
        *torch_contenders(dtype),
        *selective_contenders(device),
        *selective_contenders(device, statistics=True),
        *other_bases(device),
    ]
