"""From a `StepSpec` to the constants that a kernel is compiled with, and to the numbers that it reads."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
import triton.language as tl

from ..reference.random import SAMPLE_RUN, SAMPLE_SIZE
from ..spec import (
    AdamRule,
    Decay,
    GivenRule,
    Item,
    LionRule,
    Rule,
    Scalar,
    Selection,
    SGDRule,
    StepSpec,
    Strength,
    refuse_score,
)
from .device import numbers
from .device.config import BRACKET_RUN, DTYPES, Config
from .tables import is_in_place, state_columns

# Elements of a program. docs/internals/gpu-kernels.md has the measurements behind these.
BLOCK = 1024
# The same where everything that is read and written has 16 bits. Twice as many would keep as many bytes on their way.
BLOCK_OF_16_BITS = 1024
# The number of scores that a bracket is made of: one in 32, within these bounds. Smaller tensors are ranked as a whole.
FEWEST_SAMPLES, MOST_SAMPLES, ONE_IN = 8_192, 262_144, 32


# The rules by the names that the Triton functions know them by.
RULES: dict[type, str] = {AdamRule: "adam", SGDRule: "sgd", LionRule: "lion", GivenRule: "given"}
SCORES = frozenset({"update", "momentum", "nesterov"})  # those that `score_of` of `device/rules.py` has code for


def configure(item: Item, spec: StepSpec, begins: bool = False) -> Config:
    """The constants that are compiled into this item's step. `begins`: this gradient is the first of SGD's momentum."""
    rule, selection, strength = spec.rule, spec.selection, spec.strength
    columns = [None if c is None else DTYPES[c.dtype] for c in state_columns(item, rule)]
    kind = selection.unit if selection.kind == "bernoulli" else selection.kind
    if kind == "top_k" and selection.score not in SCORES:
        refuse_score("the GPU", selection.score)
    dtypes = [item.param.dtype, item.grad.dtype, *(c.dtype for c in state_columns(item, rule) if c is not None)]
    return Config(
        rule=RULES[type(rule)],
        param=DTYPES[item.param.dtype], grad=DTYPES[item.grad.dtype],
        first=columns[0], second=columns[1], third=columns[2], fourth=columns[3],
        block=BLOCK_OF_16_BITS if all(d.itemsize == 2 for d in dtypes) else BLOCK,
        amsgrad=getattr(rule, "amsgrad", False), extreme_eps=_has_extreme_eps(rule),
        usual=is_usual(rule), coupled=rule.coupled_decay != 0,
        maximize=rule.maximize, decays=_has_factor(rule),
        moves=getattr(rule, "momentum", 0.0) != 0,
        begins=begins,
        nesterov=getattr(rule, "nesterov", False), negated=getattr(rule, "negated", False),
        offset=getattr(rule, "offset", 0.0), in_place=is_in_place(item, rule), selection=kind,
        product=selection.product if kind == "agreement" else "update", strict=selection.strict, score=selection.score,
        arguments=len(selection.numbers) if kind == "function" else 0,
        share_known=_knows_share(selection, strength),
        quantile=selection.quantile if kind == "top_k" else "exact",
        estimate="sampled" if strength.is_sampled else "exact",
        strength=strength.kind, of=strength.of, still=strength.still, statistics=spec.statistics,
        control=selection.control is not None,
        control_norm=selection.control is not None and selection.control.norm,
        stochastic=spec.draw.stochastic and item.param.dtype in (torch.bfloat16, torch.float16),
        **_decay(spec.decay),
    )  # fmt: skip


def is_usual(rule: Rule) -> bool:
    """True if it is known to the host that the rate is not negative, and each average keeps more than half of itself.

    Then kernels leave out what they would do for other numbers. A number that is a tensor is not known to the host.
    """
    values: list[Scalar] = [rule.rate if isinstance(rule, GivenRule) else rule.lr]
    if isinstance(rule, AdamRule):
        values.append(rule.beta1)
    elif isinstance(rule, LionRule):
        values += rule.beta1, rule.beta2
    rate, *kept = (float("nan") if isinstance(value, torch.Tensor) else value for value in values)
    return rate >= 0 and all(beta > 0.51 for beta in kept)  # rounded to float32, too


def _has_extreme_eps(rule: Rule) -> bool:
    """True if eps is not 0, and a float32 whose inverse is not a normal number of float32."""
    return isinstance(rule, AdamRule) and rule.eps != 0 and not 2.0**-126 <= abs(rule.eps) <= 2.0**126


def _decay(decay: Decay | None) -> dict[str, Any]:
    """The fields of a `Config` that say which elements decay."""
    if decay is None:
        return {}
    return {"decay": decay.kind, "decay_of": decay.of, "decay_strict": decay.strict}


def _knows_share(selection: Selection, strength: Strength) -> bool:
    """True if a strength needs the share of the selected only, and it is known before anything is looked at."""
    exact = selection.kind == "top_k" and selection.quantile == "exact" and selection.control is None
    return exact and strength.kind == "mean_preserving" and not strength.is_sampled


def forms_update_again(cfg: Config) -> bool:
    """True if the update is there again once the moments are stored, the same bits: Adam's, if they are not rounded."""
    return cfg.rule == "adam" and all(d is None or d == tl.float32 for d in (cfg.first, cfg.second, cfg.third))


def _has_factor(rule: Rule) -> bool:
    """True if the parameter is multiplied by a factor.

    With decoupled decay of 0 the factor is 1, which changes no bit: so groups with and without decay share a batch.
    """
    return rule.decoupled if isinstance(rule, AdamRule) else rule.has_decay_factor


def static_key(spec: StepSpec) -> tuple[object, ...]:
    """A key of all that `configure` and the plans depend on, except tensors and the numbers that a schedule moves."""
    rule, selection, strength = spec.rule, spec.selection, spec.strength
    return (
        *_rule_key(rule), selection.kind, selection.product, selection.strict, selection.score,
        selection.quantile, selection.unit, selection.function, len(selection.numbers),
        None if selection.control is None else selection.control.norm,
        strength.kind, strength.of, strength.estimate, strength.still, spec.draw.stochastic, spec.statistics,
        spec.decay,
    )  # fmt: skip


def _rule_key(rule: Rule) -> tuple[object, ...]:
    usual = is_usual(rule)
    if isinstance(rule, AdamRule):
        flags = (rule.amsgrad, rule.decoupled, rule.maximize, rule.coupled_decay != 0.0, _has_extreme_eps(rule))
        return AdamRule, usual, *flags
    others = [getattr(rule, name, None) for name in ("maximize", "nesterov", "negated", "offset")]
    moves = getattr(rule, "momentum", 0.0) != 0
    return type(rule), usual, *others, rule.coupled_decay != 0, rule.has_decay_factor, moves


def has_key(spec: StepSpec, key: tuple[object, ...], before: StepSpec) -> bool:
    """True if `key` is the `static_key` of this spec, as it is that of `before`: by identity, where that is enough."""
    if spec.selection is not before.selection or spec.strength is not before.strength:
        return static_key(spec) == key
    of_rule = () if spec.rule is before.rule else _rule_key(spec.rule)
    return (
        of_rule == key[: len(of_rule)]
        and spec.draw.stochastic == before.draw.stochastic
        and spec.statistics == before.statistics
        and spec.decay == before.decay
    )


# The hyper-parameters of each rule that are read from the table, and their columns there.
_READ: dict[type, tuple[tuple[str, Any], ...]] = {
    AdamRule: (
        ("lr", numbers.LR), ("weight_decay", numbers.WEIGHT_DECAY), ("beta1", numbers.BETA1), ("beta2", numbers.BETA2),
        ("beta1", numbers.AHEAD), ("eps", numbers.EPSILON),
    ),
    LionRule: (
        ("lr", numbers.LR), ("weight_decay", numbers.WEIGHT_DECAY), ("beta1", numbers.BETA1), ("beta2", numbers.BETA2),
        ("beta2", numbers.AHEAD), ("decay_factor", numbers.DECAY_FACTOR),
    ),
    SGDRule: (
        ("lr", numbers.LR), ("weight_decay", numbers.WEIGHT_DECAY), ("momentum", numbers.SGD_MOMENTUM),
        ("dampening", numbers.DAMPENING), ("factor", numbers.DECAY_FACTOR),
    ),
    GivenRule: (("factor", numbers.DECAY_FACTOR), ("momentum_beta", numbers.AHEAD), ("rate", numbers.LR)),
}  # fmt: skip
_SCORE_READS = (("lr", numbers.LR), ("weight_decay", numbers.WEIGHT_DECAY))  # of the stand-in for a rule in `top_k.py`
_values_of = {rule: attrgetter(*(name for name, _ in read)) for rule, read in _READ.items()}


def rule_numbers(rule: Any) -> tuple[Scalar | None, ...]:
    """The hyper-parameters of a rule that are in the table: Python numbers, tensors, or None for a factor of 1."""
    read = _values_of.get(type(rule))
    return (rule.lr, rule.weight_decay) if read is None else read(rule)


def hyper_parameters(spec: StepSpec) -> list[Scalar]:
    """The numbers of a group, in the order of `device/numbers.py`."""
    rule, selection, strength = spec.rule, spec.selection, spec.strength
    values: list[Scalar] = [0.0] * numbers.HYPER.value
    values[numbers.DECAY_FACTOR.value] = 1.0
    columns = _READ.get(type(rule), _SCORE_READS)
    for (_, column), value in zip(columns, rule_numbers(rule), strict=True):
        values[column.value] = 1.0 if value is None else value
    for place, value in ((numbers.SELECTED, strength.selected), (numbers.REST, strength.rest),
                         (numbers.CAP, strength.cap), (numbers.TEMPERATURE, strength.temperature),
                         (numbers.SMOOTHING, strength.smoothing)):  # fmt: skip
        values[place.value] = value
    if selection.control is not None:
        values[numbers.CONTROL_CAP.value] = selection.control.cap
    further = selection.numbers
    if selection.kind == "bernoulli":
        further = (float(selection.random_limit),)
    for i, value in enumerate(further):
        values[numbers.ARGUMENT.value + i] = value
    return values


def samples_of(numel: int, selection: Selection) -> tuple[int, int]:
    """The number of a tensor's scores that are sampled, and the binary logarithm of the number of runs.

    A small tensor is its own sample: its size, and -1.
    """
    if selection.quantile == "sampled":
        return (numel, -1) if numel <= SAMPLE_SIZE else (SAMPLE_SIZE, (SAMPLE_SIZE // SAMPLE_RUN).bit_length() - 1)
    if numel <= FEWEST_SAMPLES:
        return numel, -1
    count = min(max(1 << (numel // ONE_IN).bit_length() - 1, FEWEST_SAMPLES), MOST_SAMPLES)
    return count, (count // BRACKET_RUN.value).bit_length() - 1
