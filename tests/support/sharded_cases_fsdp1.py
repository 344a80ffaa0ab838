"""FSDP1, which joins parameters into flat ones: selection on those is refused, and dense groups are the base's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sharded_world import World
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from selective import MGUP, SelectiveUpdate
from selective.plan import refusals as arguments

WAY_OUT = "fully_shard"


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))


def _wrapped(model: torch.nn.Module, original: bool) -> Any:
    return FSDP(model, use_orig_params=original, device_id=torch.device("cpu"))


def _said(call: Callable[[], Any]) -> str:
    """The message of the ValueError that `call` raises; empty if it raises none."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def refused_where_it_is_made(world: World) -> None:
    found = []
    for original in (True, False):
        params = list(_wrapped(_model(), original).parameters())
        for options in ({"policy": MGUP()}, {"preconditioner": "Eigenbasis"}, {"policy": MGUP(), "scope": "local"}):
            found.append(_said(lambda p=params, o=options: SelectiveUpdate(torch.optim.AdamW(p), **o)))  # type: ignore[arg-type]
    assert all(WAY_OUT in message and "param_groups[0][0]" in message for message in found), found


def refused_when_the_model_is_wrapped_later(world: World) -> None:
    """The first use of the optimizer, whatever it is, refuses by name, and nothing has moved."""
    found = []
    for use in ("explain", "state_dict", "step", "optim_state_dict", "add_param_group"):
        model = _model()
        optimizer = SelectiveUpdate(torch.optim.AdamW(model.parameters()), policy=MGUP())
        sharded = _wrapped(model, original=True)
        sharded(torch.ones(2, 8)).sum().backward()
        before = [p.detach().clone() for p in model.parameters()]
        calls = {
            "optim_state_dict": lambda s=sharded, o=optimizer: FSDP.optim_state_dict(s, o),
            "add_param_group": lambda o=optimizer: o.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]}),
        }
        found.append(_said(calls.get(use, getattr(optimizer, use, None))))  # type: ignore[arg-type]
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)), use
    assert all(WAY_OUT in message for message in found), found


def dense_groups_are_the_bases(world: World) -> None:
    """Without selection and rotation a step is the base's own, and torch can save its state."""
    runs = []
    for wrap in (False, True):
        sharded = _wrapped(_model(), original=True)
        optimizer: Any = torch.optim.AdamW(sharded.parameters(), lr=0.1)
        optimizer = SelectiveUpdate(optimizer, policy=None) if wrap else optimizer
        for _ in range(2):
            sharded(torch.ones(2, 8)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append((FSDP.optim_state_dict(sharded, optimizer)["state"], [p.detach() for p in sharded.parameters()]))
    assert all(torch.equal(p, q) for p, q in zip(runs[0][1], runs[1][1], strict=True))
    assert runs[0][0].keys() == runs[1][0].keys()
    for name, entries in runs[0][0].items():
        assert entries.keys() == runs[1][0][name].keys()
        assert all(torch.equal(value, runs[1][0][name][key]) for key, value in entries.items())


def unrefused_it_fails_late(world: World) -> None:
    """The failing twin: without the check a step goes through, and much later torch finds that it can't save."""
    real, arguments._FLATTENED = arguments._FLATTENED, "_no_such_mark"
    said = ""
    try:
        sharded = _wrapped(_model(), original=True)
        optimizer = SelectiveUpdate(torch.optim.AdamW(sharded.parameters()), policy=MGUP())
        sharded(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        try:
            FSDP.optim_state_dict(sharded, optimizer)
        except Exception as error:  # torch raises an assertion, or an error about sizes, by version
            said = f"{type(error).__name__}: {error}"
    finally:
        arguments._FLATTENED = real
    assert said
    assert WAY_OUT not in said
