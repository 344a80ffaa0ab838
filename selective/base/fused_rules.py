"""The base optimizers whose step our kernels compute, by exact class: their hyper-parameters, state and moments."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _get_scalar_dtype

from selective.base.hyperparameters import plain_number, sign_of
from selective.base.lent_gradients import gradient_dtype
from selective.base.measure_moments import Moments
from selective.base.mismatch import CheckpointMismatch
from selective.base.muon import not_covered
from selective.kernels import spec

Group = dict[str, Any]
_OF_SGD = ("lr", "momentum", "dampening", "nesterov", "weight_decay", "maximize")


class FusedRule:
    """A class whose step our kernels compute: its hyper-parameters as a rule, and its state, which is made lazily."""

    moment_kinds = Moments(first=frozenset({"exp_avg"}), of_gradient=frozenset({"exp_avg"}))
    """The names of its state entries, by the way in which they are carried into another basis."""
    manner = "runs on the base's own state"
    """The end of a sentence that begins "the rule of Adam is known and"."""
    rotates = True
    """True if it can step gradients in a rotated space."""
    steps_dense = False
    """True if a group without a mask is stepped by it where that is asked for, because it is faster than the base."""

    def supports(self, group: Group) -> str | None:
        """Return the option of `group` that the rule does not cover ("flag=value"); None if it covers all."""
        return None

    def has_momentum(self, group: Group) -> bool:
        """Return True if the state has a first moment of the gradient."""
        return True

    def checked_moment_names(self, group: Group, entries: dict[str, Any], who: str) -> list[str]:
        """Return the names of the saved `entries` that are shaped like the parameter.

        `group` is the saved one, whose flags decide which entries there have to be; `who` is the name of the base.

        Raises:
            CheckpointMismatch: an entry is missing, or there is one that this base does not make.
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
        """Return the names that a state of this base must have, and those that it may have."""
        return ["exp_avg"], []

    def bound(self, group: Group) -> spec.Scalar | None:
        """Return the smallest c with |m| <= c √v after any gradients: Note [moments of one space] in rotation/carry.py.

        None if the rule does not divide by a second moment, or no such c exists.
        """
        return None

    def names(self, group: Group) -> tuple[list[str], list[str]]:
        """Return the names that a state must have if not empty, and those of entries shaped like the parameter."""
        needed, optional = self._saved_names(group)
        return needed, [name for name in (*needed, *optional) if name != "step"]

    def convert(self, group: Group, p: Tensor, state: dict[str, Any]) -> None:
        """Turn an entry that a user has set to a number into the tensor that the base itself would have made."""

    def numbers(self, group: Group) -> tuple[Any, ...] | None:
        """Return everything that `kernel_rule` reads: while all are the same objects, the rule is the same.

        None if it may read more, so that it has to be asked in every step.
        """
        return None

    def kernel_rule(self, base: Optimizer, group: Group) -> spec.Rule:
        """Return the hyper-parameters of `group` as a rule of the kernels."""
        raise TypeError(f"{type(self).__name__} must say how its rule is read off a group")

    def init_state(self, group: Group, p: Tensor, state: dict[str, Any]) -> None:
        """Fill `state` as the base's own first step would."""

    def count_step_in_group(self, group: Group) -> None:
        """Change the group as the base does once a step."""


class FusedAdam(FusedRule):
    """torch.optim.Adam and AdamW, with every flag but `differentiable`."""

    moment_kinds = Moments(
        first=frozenset({"exp_avg"}), of_gradient=frozenset({"exp_avg"}),
        second=frozenset({"exp_avg_sq", "max_exp_avg_sq"}),
    )  # fmt: skip

    def bound(self, group: Group) -> spec.Scalar | None:
        """Return c, with c² = (1 − β₁)²/(1 − β₂) / (1 − β₁²/β₂).

        It follows from m = Σ w₁(k) g_k and v = Σ w₂(k) g_k² by the inequality of Cauchy and Schwarz.
        """
        beta1, beta2 = (plain_number(beta) for beta in group["betas"])
        if isinstance(beta1, Tensor) or isinstance(beta2, Tensor):  # on a GPU: the host must not wait for it
            squared = (1 - beta1) ** 2 / ((1 - beta2) * (1 - beta1**2 / beta2))
            return torch.where(torch.as_tensor(squared > 0), squared, torch.inf).sqrt()
        if beta1**2 >= beta2:
            return None
        return (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))

    def _saved_names(self, group: Group) -> tuple[list[str], list[str]]:
        names = ["step", "exp_avg", "exp_avg_sq"]
        return (names + ["max_exp_avg_sq"], []) if group.get("amsgrad") else (names, ["max_exp_avg_sq"])

    def numbers(self, group: Group) -> tuple[Any, ...]:
        beta1, beta2 = group["betas"]  # one by one, because somebody may change a list of betas in place
        return (
            group["lr"], beta1, beta2, group["eps"], group["weight_decay"],
            group.get("decoupled_weight_decay", False), group["amsgrad"], group["maximize"],
        )  # fmt: skip

    def kernel_rule(self, base: Optimizer, group: Group) -> spec.AdamRule:
        lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize = self.numbers(group)
        return spec.AdamRule(
            lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, decoupled=bool(decoupled),
            amsgrad=amsgrad, maximize=maximize,
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
            fresh: dict[str, Any] = {}
            self.init_state(group, p, fresh)
            state["step"] = fresh["step"].fill_(float(state["step"]))


class FusedSGD(FusedRule):
    """torch.optim.SGD with momentum, dampening, Nesterov, weight decay and maximize."""

    moment_kinds = Moments(first=frozenset({"momentum_buffer"}), of_gradient=frozenset({"momentum_buffer"}))

    def _saved_names(self, group: Group) -> tuple[list[str], list[str]]:
        return [], ["momentum_buffer"]

    def has_momentum(self, group: Group) -> bool:
        return group["momentum"] != 0

    def numbers(self, group: Group) -> tuple[Any, ...]:
        return tuple(group[name] for name in _OF_SGD)

    def kernel_rule(self, base: Optimizer, group: Group) -> spec.SGDRule:
        return spec.SGDRule(**dict(zip(_OF_SGD, self.numbers(group), strict=True)))


class FusedLion(FusedRule):
    """Lion of pytorch_optimizer, without its extras (gradient centralisation, AdaNorm, cautious, clipping)."""

    moment_kinds = replace(FusedRule.moment_kinds, full_steps=True)

    def supports(self, group: Group) -> str | None:
        for flag in ("use_gc", "adanorm", "cautious"):
            if group.get(flag):
                return f"{flag}={group[flag]}"
        return super().supports(group)

    def kernel_rule(self, base: Optimizer, group: Group) -> spec.LionRule:
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

    def count_step_in_group(self, group: Group) -> None:
        group["step"] = group.get("step", 0) + 1


class FusedMuon(FusedRule):
    """torch.optim.Muon with all its options, of matrices that are plain tensors.

    Its update needs whole matrices. So no kernel makes it: `capture/muon.py` does, and the kernels are given it.
    """

    moment_kinds = Moments(first=frozenset({"momentum_buffer"}), of_gradient=frozenset({"momentum_buffer"}))
    manner = "runs on the base's own state, with Newton-Schulz for all matrices of a shape together"
    rotates, steps_dense = False, True

    def supports(self, group: Group) -> str | None:
        return not_covered(group)

    def _saved_names(self, group: Group) -> tuple[list[str], list[str]]:
        return ["momentum_buffer"], []

    def kernel_rule(self, base: Optimizer, group: Group) -> spec.GivenRule:
        """Return the kind of rule that the kernels get, without its numbers."""
        return spec.GivenRule()

    def init_state(self, group: Group, p: Tensor, state: dict[str, Any]) -> None:
        if p.grad is None:
            state["momentum_buffer"] = torch.zeros_like(p, dtype=gradient_dtype(p))
        else:
            state["momentum_buffer"] = torch.zeros_like(p.grad, memory_format=torch.preserve_format)


_RULES: dict[str, Callable[[], FusedRule]] = {
    "torch.optim.adam.Adam": FusedAdam,
    "torch.optim.adamw.AdamW": FusedAdam,
    "torch.optim.sgd.SGD": FusedSGD,
    "torch.optim.Muon": FusedMuon,  # the name that torch gives it
    "torch.optim._muon.Muon": FusedMuon,
    "pytorch_optimizer.optimizer.lion.Lion": FusedLion,
}


def fused_rule(base: Optimizer) -> FusedRule | None:
    """Return the fused rule of a base; None if there is none for its exact class (a subclass may change the step)."""
    cls = type(base)
    make = _RULES.get(f"{cls.__module__}.{cls.__qualname__}")
    return None if make is None else make()
