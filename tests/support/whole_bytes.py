"""All of an optimizer as bytes, to show that nothing has moved."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from selective import SelectiveUpdate


def bytes_of(value: Any) -> Any:
    """A tensor as dtype, shape, device and bytes, so that NaN equals itself. Containers are converted likewise."""
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), str(value.device), raw
    if isinstance(value, Mapping):
        return {str(key): bytes_of(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [bytes_of(entry) for entry in value]
    return repr(value)


def everything(optimizer: SelectiveUpdate) -> dict[str, Any]:
    """Parameters and their addresses, the base's state and groups, ours, the clock, policies and preconditioners."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "parameters": [(p.data_ptr(), bytes_of(p)) for p in params],
        "state": [bytes_of(dict(optimizer.state[p])) if p in optimizer.state else None for p in params],
        "base": [bytes_of(optimizer.base.state[p]) if p in optimizer.base.state else None for p in params],
        "groups": [{k: bytes_of(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
        "clock": (optimizer.count.steps, optimizer.count.seed),
        "policies": [repr(group.policy) for group in optimizer.policy_groups],
        "preconditioners": [repr(group) for group in optimizer.preconditioner_groups],
        "explained": optimizer.explain(),
    }


def model_bytes(optimizer: SelectiveUpdate) -> list[Any]:
    return [bytes_of(p) for group in optimizer.param_groups for p in group["params"]]


def difference(before: Any, after: Any, where: str = "") -> str | None:
    """The first place at which two results of `everything` differ; None if they are equal."""
    if isinstance(before, dict) and isinstance(after, dict) and before.keys() == after.keys():
        found = (difference(before[key], after[key], f"{where}/{key}") for key in before)
        return next((one for one in found if one is not None), None)
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = zip(before, after, strict=True)
        found = (difference(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(pairs))
        return next((one for one in found if one is not None), None)
    return None if before == after else f"{where}: {str(before)[:200]} became {str(after)[:200]}"


def through_a_file(data: Any) -> Any:
    """Save, and load as cautious users do."""
    buffer = io.BytesIO()
    torch.save(data, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)
