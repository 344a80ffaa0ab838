"""A table of the facts about widely used classes, so that wrapping them needs no measurement.

Every entry says the same as a measurement; a test compares them. An entry is right for the options that it names. A
group with another option switched on (of a newer version, or gradient centralisation) is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim import Optimizer

from selective.base.facts import (
    DECAY,
    FROM_SECOND_STEP,
    LR_DECAY,
    RELATIVE_LR,
    STABLE_ADAMW,
    TRANSFORMERS_ADAFACTOR,
    BaseFacts,
)
from selective.base.refusals import refused_seen, refused_unseen, unsteppable

Describe = Callable[[Optimizer, Mapping[str, Any]], BaseFacts]

# Options that no entry has to name: they do not change the facts, or the class does not read them.
_HARMLESS = frozenset(
    "params param_names name lr initial_lr max_lr min_lr max_momentum base_momentum swa_lr weight_decay eps betas beta "
    "beta1 beta2 foreach fused capturable maximize step setup kahan_sum triton".split()
)


@dataclass(frozen=True)
class Known:
    """The entry of a class: its facts as a function of base and group, and the options that the function covers."""

    describe: Describe
    options: frozenset[str]

    def covers(self, group: Mapping[str, Any]) -> bool:
        """Return True if the entry knows every option that is switched on."""
        return all(self.knows(k) or not _is_on(v) for k, v in group.items())

    def knows(self, option: str) -> bool:
        """Return True if the entry takes this option into account, or it changes nothing."""
        return option in _HARMLESS or option in self.options


def _is_on(value: Any) -> bool:
    return value is not None and value is not False


def lookup(base: Optimizer, group: Mapping[str, Any]) -> BaseFacts | None:
    """Return the table's facts for this group of `base`; None if they have to be measured."""
    known = KNOWN.get(qualified_name(type(base)))
    if known is None or not known.covers(group) or refused_unseen(base, group) is not None:
        return None
    return replace(known.describe(base, group), source="table")


def why_measured(base: Optimizer, group: Mapping[str, Any]) -> str:
    """Return the reason why the table has no facts for this group of `base`."""
    name, known = type(base).__name__, KNOWN.get(qualified_name(type(base)))
    if known is None:
        return f"{name} is an unknown class"
    strange = [key for key, value in group.items() if _is_on(value) and not known.knows(key)]
    if not strange:
        return f"{name} is known, but not as it is here"
    keys = ", ".join(map(repr, strange))
    return f"{name} is known, but this group has {keys}, which the class may read or not"


def qualified_name(cls: type) -> str:
    """Return top-level package and class, "torch.AdamW": the modules between them move from version to version."""
    return f"{cls.__module__.split('.')[0]}.{cls.__qualname__}"


def _coupled(base: Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    climbs = group.get("maximize", getattr(base, "maximize", False))
    return {"decay": "coupled", "decay_sign": -1.0 if climbs else 1.0}


def _decoupled(rule: str = LR_DECAY) -> dict[str, Any]:
    return {"decay": "decoupled", "decay_rule": rule}


def _moment(key: str | None, reader: str = "plain") -> dict[str, Any]:
    return {} if key is None else {"momentum_key": key, "momentum_reader": reader}


# --- torch ----------------------------------------------------------------------------------------------------------


def _torch(key: str | None = None, *, depends: bool = False, decoupled: bool = False) -> Describe:
    def describe(base: Optimizer, group: Mapping[str, Any]) -> BaseFacts:
        is_decoupled = group.get("decoupled_weight_decay", decoupled)
        decay = _decoupled() if is_decoupled else _coupled(base, group)
        return BaseFacts(depends_on_param=depends, **decay, **_moment(key))

    return describe


def _torch_sgd(base: Optimizer, group: Mapping[str, Any]) -> BaseFacts:
    has_momentum = group["momentum"] != 0
    momentum = _moment("momentum_buffer" if has_momentum else None)
    return BaseFacts(**_coupled(base, group), **momentum, stateless=not has_momentum)


def _torch_rmsprop(base: Optimizer, group: Mapping[str, Any]) -> BaseFacts:
    # `momentum_buffer` is an average of the normalised gradient. `grad_avg` is one of the gradient itself.
    return BaseFacts(**_coupled(base, group), **_moment("grad_avg" if group["centered"] else None))


def _no_decay(base: Optimizer, group: Mapping[str, Any]) -> BaseFacts:
    return BaseFacts()


def _refused(*embeds: str) -> Describe:
    def describe(base: Optimizer, group: Mapping[str, Any]) -> BaseFacts:
        return BaseFacts(depends_on_param=True, embeds_param=embeds, refusal=refused_seen(base, group, embeds))

    return describe


def _sparse_only(base: Optimizer, group: Mapping[str, Any]) -> BaseFacts:
    return BaseFacts(refusal=unsteppable(base, RuntimeError("SparseAdam does not support dense gradients")))


# --- pytorch_optimizer ----------------------------------------------------------------------------------------------


def _po(key: str | None = "exp_avg", *, depends: bool = False) -> Describe:
    def describe(base: Optimizer, group: Mapping[str, Any]) -> BaseFacts:
        decay = _decoupled(DECAY if group.get("fixed_decay") else LR_DECAY)
        if not group["weight_decouple"]:
            decay = _coupled(base, group)
        # it adds the decay to `p.grad` in place, and negates it there to maximize
        writes = decay["decay"] == "coupled" or bool(getattr(base, "maximize", False))
        return BaseFacts(depends_on_param=depends, **decay, **_moment(key), writes_grad=writes)

    return describe


def _po_lamb(base: Optimizer, group: Mapping[str, Any]) -> BaseFacts:
    facts = replace(_po(depends=True)(base, group), writes_grad=bool(getattr(base, "maximize", False)))
    if group["weight_decouple"]:
        return facts
    return replace(facts, decay="inside", decay_sign=1.0)  # decay is added to the update before its norm is taken


def _po_stable_adamw(base: Optimizer, group: Mapping[str, Any]) -> BaseFacts:
    facts = _po()(base, group)
    if facts.decay == "decoupled":
        facts = replace(facts, decay_rule=STABLE_ADAMW)
    return _with_kahan(facts, group, default=False)


def _po_soap(base: Optimizer, group: Mapping[str, Any]) -> BaseFacts:
    # This SOAP keeps its first moment unrotated. Its first step only initialises the basis.
    return BaseFacts(
        **_decoupled(FROM_SECOND_STEP), **_moment("exp_avg"), writes_grad=bool(getattr(base, "maximize", False))
    )


# --- torch-optimi ---------------------------------------------------------------------------------------------------


def _with_kahan(facts: BaseFacts, group: Mapping[str, Any], default: bool = True) -> BaseFacts:
    low = any(p.dtype in (torch.float16, torch.bfloat16) for p in group["params"])
    kahan = group.get("kahan_sum")
    if not low or not (default if kahan is None else kahan):
        return facts
    return replace(facts, residue=("kahan_comp",), writes_grad=True, stateless=False)  # p.grad is its scratch space


def _optimi(decoupled: bool | None = None, rule: str | None = None) -> Describe:
    def describe(base: Optimizer, group: Mapping[str, Any]) -> BaseFacts:
        is_decoupled = group.get("decouple_wd", False) if decoupled is None else decoupled
        if is_decoupled or group["decouple_lr"]:
            decay = _decoupled(rule or (RELATIVE_LR if group["decouple_lr"] else LR_DECAY))
        else:
            decay = _coupled(base, group)
        has_momentum = group.get("momentum", 1) != 0
        facts = BaseFacts(**decay, **_moment("exp_avg" if has_momentum else None), stateless=not has_momentum)
        return _with_kahan(replace(facts, writes_grad=decay["decay"] == "coupled"), group)

    return describe


# --- others ---------------------------------------------------------------------------------------------------------


def _transformers_adafactor(base: Optimizer, group: Mapping[str, Any]) -> BaseFacts:
    scaled = bool(group["scale_parameter"])
    rule = TRANSFORMERS_ADAFACTOR if scaled or group["relative_step"] else LR_DECAY
    return BaseFacts(depends_on_param=scaled, **_decoupled(rule))  # its exp_avg is an average of the normalised update


def _torchao_adamw(base: Optimizer, group: Mapping[str, Any]) -> BaseFacts:
    return BaseFacts(**_decoupled(), **_moment("exp_avg", "dequantize"))


def _known(describe: Describe, options: str = "") -> Known:
    return Known(describe, frozenset(options.split()))


_OPTIMI = "decouple_wd decouple_lr"
_PO = "weight_decouple fixed_decay"
KNOWN: dict[str, Known] = {
    "torch.SGD": _known(_torch_sgd, "momentum dampening nesterov"),
    "torch.Adam": _known(_torch("exp_avg"), "amsgrad decoupled_weight_decay"),
    "torch.AdamW": _known(_torch("exp_avg", decoupled=True), "amsgrad decoupled_weight_decay"),
    "torch.NAdam": _known(_torch("exp_avg"), "momentum_decay decoupled_weight_decay"),
    "torch.RAdam": _known(_torch("exp_avg"), "decoupled_weight_decay"),
    "torch.Adamax": _known(_torch("exp_avg")),
    "torch.RMSprop": _known(_torch_rmsprop, "momentum alpha centered"),
    "torch.Adagrad": _known(_torch(), "lr_decay initial_accumulator_value"),
    "torch.Adadelta": _known(_torch(), "rho"),
    "torch.Adafactor": _known(_torch(depends=True, decoupled=True), "beta2_decay d"),
    "torch.Muon": _known(
        _torch("momentum_buffer", decoupled=True), "momentum nesterov ns_coefficients ns_steps adjust_lr_fn"
    ),
    "torch.ASGD": _known(_refused("ax"), "lambd alpha t0"),
    "torch.Rprop": _known(_no_decay, "etas step_sizes"),
    "torch.SparseAdam": _known(_sparse_only),
    "pytorch_optimizer.Lion": _known(_po(), _PO),
    "pytorch_optimizer.Tiger": _known(_po(), _PO),
    "pytorch_optimizer.AdEMAMix": _known(_po(), f"{_PO} alpha t_alpha_beta3"),
    "pytorch_optimizer.CAME": _known(_po(None), f"{_PO} ams_bound clip_threshold eps1 eps2"),
    "pytorch_optimizer.Lamb": _known(_po_lamb, f"{_PO} grad_averaging max_grad_norm"),
    "pytorch_optimizer.StableAdamW": _known(_po_stable_adamw, _PO),
    "pytorch_optimizer.SOAP": _known(
        _po_soap,
        "shampoo_beta precondition_frequency max_precondition_dim merge_dims precondition_1d correct_bias "
        "normalize_gradient",
    ),
    "optimi.Adam": _known(_optimi(), _OPTIMI),
    "optimi.AdamW": _known(_optimi(True), _OPTIMI),
    "optimi.Lion": _known(_optimi(True), _OPTIMI),
    "optimi.SGD": _known(_optimi(), f"{_OPTIMI} momentum"),
    "optimi.StableAdamW": _known(_optimi(True, STABLE_ADAMW), _OPTIMI),
    "transformers.Adafactor": _known(
        _transformers_adafactor, "clip_threshold decay_rate scale_parameter relative_step warmup_init"
    ),
    "torchao.AdamW8bit": _known(_torchao_adamw, "amsgrad"),
}
"""The entries by `qualified_name`. LBFGS and wrappers are refused before; Prodigy and schedule-free are measured."""
