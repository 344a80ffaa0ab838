"""Kinds that a model itself names: heads, embeddings, no decay; and those that its modules show: adapters, routers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from selective.param_groups.adapters import is_adapter
from selective.param_groups.joined_weights import NamedParameter

_ROUTER_NAME = re.compile(r"(^|_)router(_|$)")
_ROUTER_CLASS = re.compile(r"Router|TopKGate|MoEGate")
_GATE_NAMES = ("gate", "gating", "wg")  # a router's only where experts stand beside it; else that of a gated MLP


@dataclass
class Answers:
    """Kinds of parameters by id, each with its reason, and the reasons why parameters do not decay, by id."""

    kinds: dict[int, tuple[str, str]] = field(default_factory=dict)
    no_decay: dict[int, str] = field(default_factory=dict)


def ask_model(model: nn.Module, parameters: list[NamedParameter], modules: Mapping[str, nn.Module]) -> Answers:
    """Ask the model, and look at its structure. Later answers win over earlier ones.

    `modules` has each module of the model by its path.
    """
    answers = Answers()
    for parameter in parameters:
        why = _router(parameter, modules)
        if why is not None:
            answers.kinds[id(parameter.tensor)] = "routers", why
    last = next((path for path, m in reversed(list(modules.items())) if isinstance(m, nn.Linear)), "")
    if last.rpartition(".")[2] == "fc" and not any(part.isdecimal() for part in last.split(".")):
        answers.kinds[id(modules[last].weight)] = "head", "the last linear layer, called fc"
    for method, kind in (
        ("get_classifier", "head"), ("get_output_embeddings", "head"), ("get_input_embeddings", "embeddings"),
    ):  # fmt: skip
        for tensor in _named_by(method, modules):
            if kind == "embeddings" and tensor.dim() > 2:
                continue  # the convolution of a vision model's patches decays like others
            answers.kinds[id(tensor)] = kind, f"the model's {method}()"
    for parameter in parameters:
        p = parameter.tensor
        if is_adapter(parameter):
            answers.kinds.pop(id(p), None)
            if p.dim() == 2:
                answers.kinds[id(p)] = "matrices", "a LoRA adapter"
        elif _all_called(parameter, r"(^|_)bias_table$"):
            answers.kinds[id(p)] = "embeddings", "a table of biases by position"
        elif _all_called(parameter, "A_log"):
            answers.kinds[id(p)] = "vectors", "the rates of a state space"
        elif _all_called(parameter, r"(^|_)bias$"):
            answers.kinds[id(p)] = "vectors", "a stack of biases"
    answers.no_decay = _no_decay(parameters, modules)
    return answers


def _all_called(parameter: NamedParameter, pattern: str) -> bool:
    """True if the parameter has two dimensions, and the pattern is in the last part of each of its names."""
    return parameter.tensor.dim() == 2 and all(re.search(pattern, n.rpartition(".")[2]) for n in parameter.names)


def _router(parameter: NamedParameter, modules: Mapping[str, nn.Module]) -> str | None:
    """The reason why a parameter is a router's; None if it is none."""
    if parameter.tensor.dim() != 2:
        return None
    for name, module in zip(parameter.names, parameter.modules, strict=True):
        path = name.split(".")
        if _ROUTER_CLASS.search(type(module).__name__):
            return f"of a {type(module).__name__}"
        if any(_ROUTER_NAME.search(part.lower()) for part in path[-3:]):
            return "called so"
        for place, part in enumerate(path):
            parent = modules.get(".".join(path[:place]))
            if part in _GATE_NAMES and parent is not None and any("expert" in n.lower() for n in _children(parent)):
                return f"{part}, beside experts"
    return None


def _children(module: nn.Module) -> list[str]:
    """The names of a module's own submodules and parameters."""
    return [*module._modules, *module._parameters]


def _named_by(method: str, modules: Mapping[str, nn.Module]) -> Iterator[Tensor]:
    """Yield the weights that modules return from `method`. One that has no answer raises or returns None."""
    for module in modules.values():
        if not callable(getattr(type(module), method, None)):
            continue
        try:
            answer = getattr(module, method)()
        except Exception:  # transformers: of a model without such a layer; others want arguments
            continue
        yield from _weights(answer)


def _weights(answer: Any) -> Iterator[Tensor]:
    """Yield the parameters with two dimensions or more in a module, a parameter, or a list or dictionary of such."""
    if isinstance(answer, nn.Module):
        yield from (p for p in answer.parameters() if p.dim() > 1)
    elif isinstance(answer, Tensor) and answer.dim() > 1:
        yield answer
    elif isinstance(answer, (list, tuple)):
        for each in answer:
            yield from _weights(each)
    elif isinstance(answer, Mapping):
        yield from _weights(list(answer.values()))


def _no_decay(parameters: list[NamedParameter], modules: Mapping[str, nn.Module]) -> dict[int, str]:
    """The parameters that a module's `no_weight_decay()` names, or whose name has one of its keywords (timm's Swin).

    Also those that are marked as state space models mark theirs.
    """
    marked = [p.tensor for p in parameters if getattr(p.tensor, "_no_weight_decay", False) is True]
    reasons = {id(tensor): "no decay: marked by _no_weight_decay" for tensor in marked}
    for path, module in modules.items():
        prefix = f"{path}." if path else ""
        names, keywords = _set_from(module, "no_weight_decay"), _set_from(module, "no_weight_decay_keywords")
        if not names and not keywords:
            continue
        for parameter in parameters:
            inside = [name.removeprefix(prefix) for name in parameter.names if name.startswith(prefix)]
            if any(name in names or any(word in name for word in keywords) for name in inside):
                reasons[id(parameter.tensor)] = "no decay: the model's no_weight_decay()"
    return reasons


def _set_from(module: nn.Module, method: str) -> set[str]:
    """The names that a module's method returns, or that it has in an attribute. A method with arguments has none."""
    answer: Any = getattr(module, method, None)
    if callable(answer):
        try:
            answer = answer()
        except TypeError:
            return set()
    return {answer} if isinstance(answer, str) else {str(name) for name in answer or ()}
