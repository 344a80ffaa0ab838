"""parts="auto": the weights that are known to hold several matrices, by their names, shapes and layers.

A weight is taken apart only where its layer cuts the output into equal parts, one after the other. Those in which heads
or pairs take turns are left as they are, and so is what is not known.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from selective.param_groups.adapters import is_adapter
from selective.param_groups.joined_weights import GATES, NamedParameter, is_transposed, may_be_joined

_QUERIES_KEYS_VALUES = ("qkv", "qkv_proj", "in_proj_weight", "Wqkv", "c_attn")
_TWO_HALVES = ("gate_up_proj", "w12")
# Layers of transformers with such names whose parts take turns: by groups of heads, or gate and value in pairs.
_TAKE_TURNS = (
    "CodeGenAttention",
    "GPTBigCodeAttention",
    "MiniMaxLightningAttention",
    "InternLM2Attention",
    "GptOssExperts",
)


def known_to_be_joined(
    parameters: list[NamedParameter], modules: Mapping[str, nn.Module]
) -> dict[int, tuple[str, str]]:
    """The parameters that hold several matrices: by id, their kind ("rows:3", "columns:2") and the reason.

    `modules` has each module of the model by its path.
    """
    views = {id(parameter.tensor): _view(parameter, modules) for parameter in parameters if not is_adapter(parameter)}
    return {key: view for key, view in views.items() if view is not None}


def _view(parameter: NamedParameter, modules: Mapping[str, nn.Module]) -> tuple[str, str] | None:
    p = parameter.tensor
    if p.dim() not in (2, 3):
        return None
    for name, module in zip(parameter.names, parameter.modules, strict=True):
        *path, attribute = name.split(".")
        around = [type(module).__name__, type(modules[".".join(path[:-1])]).__name__]
        if any(each in _TAKE_TURNS for each in around):
            continue
        if type(module) in GATES and p.dim() == 2 and not attribute.startswith("weight_hr"):  # an LSTM's projection
            count = GATES[type(module)]
            return (f"rows:{count}", f"{count} gates, one below the other") if p.shape[0] % count == 0 else None
        called = attribute if attribute != "weight" or not path else path[-1]
        view = _view_by_name(parameter, called, module)
        if view is not None:
            what = "queries, keys and values" if view.endswith("3") else "two halves"
            where = "side by side" if view.startswith("columns") else "one below the other"
            return view, f"{what}, {where}"
    return None


def _view_by_name(parameter: NamedParameter, called: str, module: nn.Module) -> str | None:
    """The view of a parameter that belongs to a layer (or is itself) `called` so; None if it is one matrix."""
    p = parameter.tensor
    if called in _QUERIES_KEYS_VALUES and p.dim() == 2:
        if is_transposed(parameter):  # two: the keys and values of a cross-attention
            return next((f"columns:{count}" for count in (3, 2) if p.shape[1] == count * p.shape[0]), None)
        return "rows:3" if may_be_joined(p, 3) else None
    if called in _TWO_HALVES and p.dim() == 2 and not is_transposed(parameter):
        return "rows:2" if may_be_joined(p, 2) else None
    if called == "gate_up_proj" and p.dim() == 3:  # a stack of experts: the projection back says which side is which
        back = module._parameters.get("down_proj")
        if back is None or back.dim() != 3:
            return None
        (_, first, second), (_, back_first, back_second) = p.shape, back.shape
        if first == 2 * back_second and second == back_first:
            return "rows:2"
        if second == 2 * back_first and first == back_second:
            return "columns:2"
    return None
