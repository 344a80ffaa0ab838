"""Spoilt checkpoints: every way to spoil every entry of ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from selective.state.entries import PREFIX

Spoilt = dict[str, Any]


def noise(like: Tensor, seed: int = 0) -> Tensor:
    """Replace a tensor's bytes by random ones."""
    count = like.numel() * like.element_size()
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(like.dtype).reshape(like.shape).clone() if count else like.clone()


def in_place_of(value: Tensor) -> dict[str, Any]:
    """Wrong values for an entry, by their fault."""
    found: dict[str, Any] = {
        "none": None, "text": "x", "list": [1, 2], "dictionary": {"a": 1}, "bool": True, "nan": float("nan"),
        "float64": value.to(torch.float64), "bfloat16": value.to(torch.bfloat16), "int64": value.to(torch.int64),
        "uint8": value.to(torch.uint8), "boolean": value.to(torch.bool), "complex": value.to(torch.complex64),
        "one dimension more": value[None].clone(), "twice": torch.cat([value.reshape(-1)] * 2),
        "empty": value.new_zeros(0), "no dimension": value.new_ones(()), "meta": value.to("meta"),
        "sparse": value.reshape(-1).to_sparse(), "negative": -value.to(torch.int64).abs() - 1,
        "huge": torch.full_like(value, 255 if value.dtype == torch.uint8 else 2**62), "zero": torch.zeros_like(value),
        "largest": torch.full((), 2**63 - 1), "number": 3, "negative number": -3, "huge number": 2**80,
    }  # fmt: skip
    if value.is_floating_point():
        found |= {"infinite": torch.full_like(value, float("inf")), "negative": -value.abs() - 1}
        if value.dim() == 3:
            found["sparse"] = value.to_sparse()  # of the right shape and dtype
    else:
        found["minus one"] = torch.full_like(value, 255 if value.dtype == torch.uint8 else -1)
    for seed in range(3):
        found[f"random bytes {seed}"] = noise(value, seed)
    return found


def copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: copied(entry) for key, entry in value.items()}
    return [copied(entry) for entry in value] if isinstance(value, list) else value


def spoilt_entries(state: dict[str, Any]) -> Iterator[tuple[str, Spoilt]]:
    """Remove, rename and replace each entry of ours, in all parameters and in the last that has it."""
    indices = [i for i, entries in state["state"].items() if any(k.startswith(PREFIX) for k in entries)]
    keys = sorted({k for i in indices for k in state["state"][i] if k.startswith(PREFIX)})
    for key in keys:
        having = [i for i in indices if key in state["state"][i]]
        for where, chosen in (("in all", having), ("in one", having[-1:])):
            yield f"{key} removed {where}", _changed(state, chosen, lambda entries, key=key: entries.pop(key))
            yield (
                f"{key} renamed {where}",
                _changed(state, chosen, lambda e, key=key: e.update({key + "x": e.pop(key)})),
            )
            for name in in_place_of(state["state"][having[0]][key]):
                change = lambda e, key=key, name=name: e.update({key: in_place_of(e[key])[name]})  # noqa: E731
                yield f"{key} {name} {where}", _changed(state, chosen, change)


def _changed(state: dict[str, Any], indices: list[Any], change: Any) -> Spoilt:
    made = copied(state)
    for index in indices:
        change(made["state"][index])
    return made


def spoilt_frames(state: dict[str, Any]) -> Iterator[tuple[str, Spoilt]]:
    """Spoil the frame of the entries: the dictionary, the groups, the numbers of parameters."""
    for key in ("state", "param_groups"):
        yield f"{key} removed", {k: v for k, v in state.items() if k != key}
        for name, value in {
            "none": None,
            "text": "x",
            "list": [],
            "number": 3,
            "dictionary": {},
            "pairs": [(1, 2)],
        }.items():
            if (key, name) != (
                "state",
                "dictionary",
            ):  # that would be the checkpoint of an optimizer that has not stepped
                yield f"{key} {name}", {**copied(state), key: value}
    groups = state["param_groups"]
    params = groups[0]["params"]
    instead = {
        "gone": None, "none": None, "number": 3, "tensor": torch.ones(3), "twice": [params[0]] * len(params),
        "short": params[:-1], "unhashable": [[i] for i in params],
    }  # fmt: skip
    for name, value in instead.items():
        made = copied(state)
        made["param_groups"][0]["params"] = value
        if name == "gone":
            del made["param_groups"][0]["params"]
        yield f"params {name}", made
    yield "a group more", {**copied(state), "param_groups": [*copied(groups), copied(groups[0])]}
    for option in ("policy", "preconditioner", "matrix_view"):
        made = copied(state)
        made["param_groups"][0][option] = "Nothing"
        yield f"{option} in a group", made
    for option in sorted(set(groups[0]) - {"params"}):
        made = copied(state)
        del made["param_groups"][0][option]
        yield f"{option} gone from a group", made
    last = list(state["state"])[-1]
    for name, value in {"none": None, "text": "x", "number": 3, "list": [1]}.items():
        made = copied(state)
        made["state"][last] = value
        yield f"the state of a parameter is {name}", made
    made = copied(state)
    made["state"][99] = made["state"].pop(last)
    yield "a parameter that there is not", made
