"""No step makes the host wait for the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from selective import MGUP, Eigenbasis, Policy

from .given import Given
from .layouts import UNSHARDED, Layout
from .optimizers import BASES, POLICIES
from .results import Result

SHAPES = [(64, 32), (32, 64), (32, 32), (48,)]


def waits(layout: Layout) -> Iterator[Result]:
    """A result for each policy and for two rotations between refreshes; on a CPU there is nothing to wait for."""
    if not layout.ranks.on_gpu:
        yield Result("waits", layout.name, "every policy", None, "only a GPU can be waited for")
        return
    seldom: dict[str, Any] = {"refresh_every": 1000, "stagger": False}
    spaces = {"gathered rotation": Eigenbasis(**seldom)}
    if layout.name in UNSHARDED:
        spaces["unsharded rotation"] = Eigenbasis(sides="unsharded", **seldom)
    cases: dict[str, tuple[Policy, Eigenbasis | None]] = {name: (policy, None) for name, policy in POLICIES.items()}
    cases |= {name: (MGUP(), space) for name, space in spaces.items()}
    for name, (policy, space) in cases.items():
        run = Given(BASES["AdamW"], SHAPES, layout.ranks.device, (policy,), layout, preconditioner=space)
        for number in range(3):  # state, bases, tables and compiled kernels
            run.step(number)
        waited = waiting(run.optimizer.step)
        yield Result("waits", layout.name, name, waited is None, waited or "the host does not wait")


def waiting(step: Callable[[], Any]) -> str | None:
    """Return torch's words about the first wait for the GPU in a step; None if there is none."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error).splitlines()[0][:80]
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return None
