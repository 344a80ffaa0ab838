"""Says which tensors the kernels can step, and makes contiguous copies of those that need it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..spec import GivenRule, Item, Rule, Selection, StepSpec
from .device.config import DTYPES
from .tables import is_dense, state_columns


def unsupported(item: Item, rule: Rule, selection: Selection | None = None) -> str | None:
    """The reason why the kernels can't step this item, in words; None if they can."""
    param = item.param
    if type(param) not in (Tensor, torch.nn.Parameter):
        return f"the parameter is a {type(param).__name__}"
    tensors = {"parameter": param, "gradient": item.grad}
    tensors |= {f"state column {i}": c for i, c in enumerate(state_columns(item, rule)) if c is not None}
    for what, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            return f"the {what} is {str(tensor.dtype).removeprefix('torch.')}"
        if tensor.device != param.device:
            return f"the {what} is on {tensor.device}"
        if tensor.shape != param.shape:
            return f"the {what} has shape {tuple(tensor.shape)}"
    step = item.state.get("step") if rule.counts_steps else None
    if step is not None and step.device.type != "cpu" and step.dtype != torch.float32:
        return f"the step counter is {str(step.dtype).removeprefix('torch.')}"
    average = item.policy_state.get("average")
    if average is not None and (
        average.dtype != torch.float32 or average.numel() != 1 or average.device != param.device
    ):
        return "its average is not one float32 number on the same device"
    if "max_exp_avg_sq" in rule.state_names and item.state and "max_exp_avg_sq" not in item.state:
        return "its state has no max_exp_avg_sq"
    if param.numel() >= 1 << 32:
        return "the parameter has 2^32 elements or more"
    if selection is not None and selection.kind == "top_k" and param.numel() >= 1 << 31:
        return "the parameter has 2^31 elements or more, which are not ranked"
    return None


def order_matters(spec: StepSpec, item: Item) -> bool:
    """True if a coordinate's flat index decides over it: then memory has to be in row-major order."""
    selection = spec.selection
    if selection.kind == "bernoulli" and selection.unit != "tensor":
        return True
    if spec.strength.is_sampled or selection.control is not None:
        return True
    return selection.kind == "top_k" or (spec.draw.stochastic and item.param.dtype != torch.float32)


def arrange(item: Item, rule: Rule, ordered: bool) -> tuple[Item, list[tuple[Tensor, Tensor]]]:
    """The item with contiguous tensors, and the (tensor, copy) pairs to write back after the step.

    Tensors of one dense layout (channels last, say) stay as they are if the order of elements means nothing, that is
    if `ordered` is False.
    """
    columns = [c for c in state_columns(item, rule) if c is not None]
    tensors = [item.param, item.grad, *columns]
    if all(x.is_contiguous() for x in tensors):
        return item, []
    same = all(x.stride() == item.param.stride() for x in tensors)
    if same and not ordered and is_dense(item.param):
        return item, []
    copies: dict[int, Tensor] = {}
    back: list[tuple[Tensor, Tensor]] = []
    for x in tensors:
        if not x.is_contiguous() and id(x) not in copies:
            copies[id(x)] = x.detach().contiguous()
            given = isinstance(rule, GivenRule)  # its state is only read, and may lie in the parameter's memory
            if x is item.param or (x is not item.grad and not given):
                back.append((x, copies[id(x)]))
    state = {k: copies.get(id(v), v) if isinstance(v, Tensor) else v for k, v in item.state.items()}
    return replace(item, param=copies.get(id(item.param), item.param), grad=copies.get(id(item.grad), item.grad),
                   state=state), back  # fmt: skip
