"""The rules that our kernels know, by the base's exact class: their hyper-parameters, state and moments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _get_scalar_dtype

from selective.base.hyperparameters import plain_number, sign_of
from selective.base.measure_moments import Moments
from selective.kernels import spec
from selective.mismatch import CheckpointMismatch

Group = dict[str, Any]


class FusedRule:
    """How to run one known class: its hyper-parameters as a rule, and its lazily made state."""

    kinds = Moments(first=frozenset({"exp_avg"}), of_gradient=frozenset({"exp_avg"}))
    """What its state entries become in another basis."""

    def supports(self, group: Group) -> str | None:
        """Why a group with these flags can't be fused; None when it can."""
        return None

    def has_momentum(self, group: Group) -> bool:
        return True

    def moments(self, group: Group, entries: dict[str, Any], who: str) -> list[str]:
        """Which entries of a saved state are shaped like the parameter; an error where it is not this base's.

        `group` is the saved one: its flags say what has to be there.
        """
        names, optional = self._saved_names(group)
        missing = [name for name in names if name not in entries]
        foreign = [name for name in entries if name not in names and name not in optional]
        if missing or foreign:
            raise CheckpointMismatch(
                f"the checkpoint is not of {who}: a parameter's state has {sorted(map(str, entries))}, expected "
                f"{sorted(names)}"
            )
        return [name for name in (*names, *optional) if name != "step" and name in entries]

    def _saved_names(self, group: Group) -> tuple[list[str], list[str]]:
        """Names that a saved state of this base must have, and those that it may have."""
        return ["exp_avg"], []

    def bound(self, group: Group) -> spec.Scalar | None:
        """The largest c in |m| <= c √v that the rule can lead to; None where it divides by no second moment, or where
        there is none: Note [moments of one space] in carry.py."""
        return None

    def names(self, group: Group) -> tuple[list[str], list[str]]:
        """What a state that is not empty must have; what of all its entries is shaped like the parameter."""
        needed, optional = self._saved_names(group)
        return needed, [name for name in (*needed, *optional) if name != "step"]

    def convert(self, group: Group, p: Tensor, state: dict[str, Any]) -> None:
        """Give an entry that was written as a number the form that the base itself gives it."""

    def rule(self, base: Optimizer, group: Group) -> spec.Rule:
        raise TypeError(f"{type(self).__name__} must say how its rule is read off a group")

    def init_state(self, group: Group, p: Tensor, state: dict[str, Any]) -> None:
        """Make the state as the base's own first step would."""

    def after(self, group: Group) -> None:
        """What the base does to the group once a step."""


class FusedAdam(FusedRule):
    """torch.optim.Adam and AdamW, with every flag but `differentiable`."""

    kinds = Moments(
        first=frozenset({"exp_avg"}), of_gradient=frozenset({"exp_avg"}),
        second=frozenset({"exp_avg_sq", "max_exp_avg_sq"}),
    )  # fmt: skip

    def bound(self, group: Group) -> spec.Scalar | None:
        """c² = (1 − β₁)²/(1 − β₂) / (1 − β₁²/β₂), from m = Σ w₁(k) g_k, v = Σ w₂(k) g_k² and Cauchy-Schwarz."""
        beta1, beta2 = (plain_number(beta) for beta in group["betas"])
        if isinstance(beta1, Tensor) or isinstance(beta2, Tensor):  # on a GPU: nobody reads it on the host
            squared = (1 - beta1) ** 2 / ((1 - beta2) * (1 - beta1**2 / beta2))
            return torch.where(torch.as_tensor(squared > 0), squared, torch.inf).sqrt()
        if beta1**2 >= beta2:
            return None
        return (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))

    def _saved_names(self, group: Group) -> tuple[list[str], list[str]]:
        names = ["step", "exp_avg", "exp_avg_sq"]
        return (names + ["max_exp_avg_sq"], []) if group.get("amsgrad") else (names, ["max_exp_avg_sq"])

    def rule(self, base: Optimizer, group: Group) -> spec.AdamRule:
        beta1, beta2 = group["betas"]
        return spec.AdamRule(
            lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"], weight_decay=group["weight_decay"],
            decoupled=bool(group.get("decoupled_weight_decay", False)), amsgrad=group["amsgrad"],
            maximize=group["maximize"],
        )  # fmt: skip

    def init_state(self, group: Group, p: Tensor, state: dict[str, Any]) -> None:
        if group["capturable"] or group["fused"]:  # torch keeps the count on the device for these
            dtype = _get_scalar_dtype(is_fused=bool(group["fused"]))
            state["step"] = torch.zeros((), dtype=dtype, device=p.device)
        else:
            state["step"] = torch.tensor(0.0, dtype=_get_scalar_dtype(), device="cpu")
        for key in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])):
            state[key] = torch.zeros_like(p, memory_format=torch.preserve_format)

    def convert(self, group: Group, p: Tensor, state: dict[str, Any]) -> None:
        if not isinstance(state["step"], Tensor):
            made: dict[str, Any] = {}
            self.init_state(group, p, made)
            state["step"] = made["step"].fill_(float(state["step"]))


class FusedSGD(FusedRule):
    """torch.optim.SGD with momentum, dampening, Nesterov, weight decay and maximize."""

    kinds = Moments(first=frozenset({"momentum_buffer"}), of_gradient=frozenset({"momentum_buffer"}))

    def _saved_names(self, group: Group) -> tuple[list[str], list[str]]:
        return [], ["momentum_buffer"]

    def has_momentum(self, group: Group) -> bool:
        return group["momentum"] != 0

    def rule(self, base: Optimizer, group: Group) -> spec.SGDRule:
        names = ("lr", "momentum", "dampening", "nesterov", "weight_decay", "maximize")
        return spec.SGDRule(**{name: group[name] for name in names})


class FusedLion(FusedRule):
    """Lion of pytorch_optimizer, without its extras (gradient centralisation, AdaNorm, cautious, clipping)."""

    def supports(self, group: Group) -> str | None:
        for flag in ("use_gc", "adanorm", "cautious"):
            if group.get(flag):
                return f"{flag}={group[flag]}"
        return super().supports(group)

    def rule(self, base: Optimizer, group: Group) -> spec.LionRule:
        lr, decay = group["lr"], group["weight_decay"]
        decoupled = bool(group.get("weight_decouple", True))
        factor = 1.0
        if decoupled:
            factor = 1.0 - decay * (1.0 if group.get("fixed_decay") else lr)
        beta1, beta2 = group["betas"]
        return spec.LionRule(
            lr=lr, beta1=beta1, beta2=beta2, decay_factor=factor, weight_decay=0.0 if decoupled else decay,
            maximize=sign_of(base, group) < 0,
        )  # fmt: skip

    def init_state(self, group: Group, p: Tensor, state: dict[str, Any]) -> None:
        state["exp_avg"] = torch.zeros_like(p)

    def after(self, group: Group) -> None:
        group["step"] = group.get("step", 0) + 1


_RULES: dict[str, Callable[[], FusedRule]] = {
    "torch.optim.adam.Adam": FusedAdam,
    "torch.optim.adamw.AdamW": FusedAdam,
    "torch.optim.sgd.SGD": FusedSGD,
    "pytorch_optimizer.optimizer.lion.Lion": FusedLion,
}


def fused_rule(base: Optimizer) -> FusedRule | None:
    """The rule of a base that we know, by its exact class (a subclass may have changed the step); None otherwise."""
    cls = type(base)
    make = _RULES.get(f"{cls.__module__}.{cls.__qualname__}")
    return None if make is None else make()
