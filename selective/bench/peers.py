"""Optimizers of other people, which are timed if they are installed. None of them is a dependency."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

from torch.nn import Parameter
from torch.optim import Optimizer

from selective.bench.contenders import ADAMW, Contender, adamw


def peer_contenders() -> list[Contender]:
    """Other people's AdamW, its cautious forms, and 8-bit states. pytorch_optimizer's AdamW is torch's own.

    A plain AdamW has to come near torch's. The others have rules of their own: the check only requires that they move
    every parameter and that nothing becomes infinite, and their time and bytes are not those of an AdamW step.
    HeavyBall keeps its state in float32 whatever the parameters' dtype is.
    """
    return [
        _peer("timm AdamW", "timm.optim", "AdamWLegacy"),
        _peer("timm AdamW, caution", "timm.optim", "AdamWLegacy", "own", caution=True),
        _peer("HeavyBall AdamW", "heavyball", "AdamW", state_bytes=4),
        _peer("HeavyBall AdamW, caution", "heavyball", "AdamW", "own", state_bytes=4, caution=True),
        _peer("optimi AdamW", "optimi", "AdamW", package="torch-optimi", kahan_sum=False),
        _peer("pytorch_optimizer LaProp", "pytorch_optimizer", "LaProp", "own"),
        _peer("pytorch_optimizer LaProp, cautious", "pytorch_optimizer", "LaProp", "own", cautious=True),
        _peer("bitsandbytes AdamW8bit", "bitsandbytes.optim", "AdamW8bit", "own", state_bytes=1),
        _peer("torchao AdamW8bit", "torchao.optim", "AdamW8bit", "own", state_bytes=1),
    ]


def _peer(
    name: str,
    module: str,
    cls: str,
    agrees: Literal["near", "own"] = "near",
    *,
    package: str | None = None,
    state_bytes: float | None = None,
    **more: Any,
) -> Contender:
    def make(params: Sequence[Parameter]) -> Optimizer:
        return getattr(import_module(module), cls)(params, **ADAMW, **more)

    top = module.partition(".")[0]
    return Contender(
        name,
        make,
        adamw(foreach=False) if agrees == "near" else None,
        agrees,
        state_bytes=state_bytes,
        missing=None if find_spec(top) is not None else f"{package or top} is not installed",
    )
