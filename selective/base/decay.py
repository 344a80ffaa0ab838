"""The factor that decoupled decay puts on a parameter, by a formula or by a measurement."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from selective.base.clone import COUNTERS, clone_with_stand_ins, unnoticed
from selective.base.facts import (
    DECAY,
    FROM_SECOND_STEP,
    LR_DECAY,
    PROXIMAL,
    RELATIVE_LR,
    STABLE_ADAMW,
    TRANSFORMERS_ADAFACTOR,
    BaseFacts,
)
from selective.base.generators import seed_all
from selective.base.state_entries import dequantized
from selective.base.step_base import call_step

Scalar = float | Tensor
DecayFormula = Callable[[Optimizer, Mapping[str, Any], Tensor], Scalar]


def _lr_times_decay(base: Optimizer, group: Mapping[str, Any], param: Tensor) -> Scalar:
    return 1 - group["lr"] * group["weight_decay"]


def _decay_alone(base: Optimizer, group: Mapping[str, Any], param: Tensor) -> Scalar:
    return 1 - group["weight_decay"]


def _relative_lr(base: Optimizer, group: Mapping[str, Any], param: Tensor) -> Scalar:
    return 1 - group["lr"] / group["max_lr"] * group["weight_decay"]


def _proximal(base: Optimizer, group: Mapping[str, Any], param: Tensor) -> Scalar:
    return 1 / (1 + group["lr"] * group["weight_decay"])


def _not_at_first(base: Optimizer, group: Mapping[str, Any], param: Tensor) -> Scalar:
    return _lr_times_decay(base, group, param) if base.state.get(param) else 1.0


def _transformers_adafactor(base: Optimizer, group: Mapping[str, Any], param: Tensor) -> Scalar:
    state = base.state.get(param, {})
    wide = param.detach() if param.dtype == torch.float64 else param.detach().float()
    scale = wide.norm().double() / math.sqrt(max(1, param.numel()))  # float64: 1 - 1e-5 has two digits in float32
    get_lr = cast(Any, base)._get_lr  # transformers.Adafactor: relative step × scale of the parameter
    return 1 - group["weight_decay"] * get_lr(group, {"step": state.get("step", 0) + 1, "RMS": scale})


def _stable_adamw(base: Optimizer, group: Mapping[str, Any], param: Tensor) -> Scalar:
    """Return StableAdamW's factor (arXiv 2304.13013): lr is divided by the RMS of g/sqrt(v) if that is above 1.

    `v` already contains the present gradient.
    """
    if param.grad is None:
        return 1.0
    beta = group["betas"][1] if "betas" in group else group["beta2"]
    step = float(group.get("step", 0)) + 1
    beta = (beta**step - beta) / (beta**step - 1)  # the bias correction, folded into beta
    square = param.grad.detach().to(torch.float64 if param.dtype == torch.float64 else torch.float32).square()
    moment = square * (1 - beta)
    if "exp_avg_sq" in base.state.get(param, {}):
        moment = moment.add_(dequantized(base.state[param]["exp_avg_sq"]).to(square.dtype), alpha=beta)
    rms = (square / moment.clamp_(min=group["eps"] ** 2)).mean().sqrt().double()
    lr = group["lr"] / group["max_lr"] if group.get("decouple_lr") else group["lr"]
    return 1 - lr / rms.clamp(min=1.0) * group["weight_decay"]


FORMULAS: dict[str, DecayFormula] = {
    LR_DECAY: _lr_times_decay,
    DECAY: _decay_alone,
    RELATIVE_LR: _relative_lr,
    PROXIMAL: _proximal,
    FROM_SECOND_STEP: _not_at_first,
    TRANSFORMERS_ADAFACTOR: _transformers_adafactor,
    STABLE_ADAMW: _stable_adamw,
}
"""The formulas that packages use, by the name that `explain()` prints. They are evaluated before the base steps."""


def decay_factor(base: Optimizer, group: Mapping[str, Any], facts: BaseFacts, param: Tensor | None = None) -> Scalar:
    """Return the factor that decoupled decay puts on `param` in the next step; 1.0 if decay is not decoupled.

    Call it before the base steps. If `lr` is a tensor, so is the factor, and nothing waits for the device. `param` may
    be left out if `facts.decay_per_parameter` is False. With the formula "measured", a clone of the base steps a copy
    of the parameter and its state, which costs two more steps.

    Raises:
        ValueError: `param` is missing, and the factor differs between parameters.
    """
    if facts.decay != "decoupled" or facts.decay_rule is None or not _positive(group["weight_decay"]):
        return 1.0
    if facts.decay_rule not in FORMULAS:
        return measured_factor(base, group, group["params"][0] if param is None else param, facts.depends_on_param)
    if facts.decay_per_parameter and param is None:
        raise ValueError(f"decay_factor: '{facts.decay_rule}' differs between parameters; pass the parameter")
    return FORMULAS[facts.decay_rule](base, group, group["params"][0] if param is None else param)


def _positive(weight_decay: Scalar) -> bool:
    return isinstance(weight_decay, Tensor) or weight_decay != 0


def measured_factor(base: Optimizer, group: Mapping[str, Any], param: Tensor, depends: bool) -> float:
    """Measure the factor with two steps of a clone from the state and the gradient of `param`.

    The gradient is the real one because a factor can depend on it (StableAdamW divides its learning rate by the
    update's size). One step starts from `param` and one from zeros. The results differ by exactly factor·param, no
    matter whether decay comes before the update or after it (APOLLO). If the update `depends` on the parameter's value,
    both steps start from `param`, one with decay and one without. The steps are in float64, so that 1e-6 of decay is
    not lost in rounding, and in float32 if the class does not accept float64.
    """
    with unnoticed():
        try:
            return _measured_in(torch.float64, base, group, param, depends)
        except (RuntimeError, TypeError, AssertionError, ValueError):
            return _measured_in(torch.float32, base, group, param, depends)


def _measured_in(dtype: torch.dtype, base: Optimizer, group: Mapping[str, Any], param: Tensor, depends: bool) -> float:
    # A parameter of zeros shows no factor. Ones show the same one, because it does not depend on the value.
    start = param.detach().to(dtype, copy=True)
    start = start if bool(start.any()) else torch.ones_like(start)
    with_decay = _one_step(base, group, param, start, {})
    if depends:
        without = _one_step(base, group, param, start, {"weight_decay": 0.0})
        return 1.0 + float(((with_decay - without) * start).sum() / (start * start).sum())
    from_zeros = _one_step(base, group, param, torch.zeros_like(start), {})
    return float(((with_decay - from_zeros) * start).sum() / (start * start).sum())


def _one_step(base: Optimizer, group: Mapping[str, Any], param: Tensor, start: Tensor, overrides: dict) -> Tensor:
    """Return the result of a clone's step from `start`, with the gradient and a copy of the state of `param`."""
    clone_param = torch.nn.Parameter(start.clone(), requires_grad=param.requires_grad)
    clone_param.grad = torch.zeros_like(start) if param.grad is None else param.grad.detach().to(start.dtype, copy=True)
    clone = clone_with_stand_ins(base, [[clone_param]], overrides, groups=[group])
    for name in COUNTERS:
        if name in group:
            clone.param_groups[0][name] = copy.deepcopy(group[name])
    for key, value in base.state.get(param, {}).items():
        is_shaped = isinstance(value, Tensor) and value.dtype == param.dtype and value.shape == param.shape
        clone.state[clone_param][key] = value.detach().to(start.dtype, copy=True) if is_shaped else copy.deepcopy(value)
    seed_all(0)
    call_step(clone)
    return clone_param.detach()
