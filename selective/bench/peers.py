"""Optimizers of other people, timed where they are installed. None of them is a dependency."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

from torch.nn import Parameter
from torch.optim import Optimizer

from selective.bench.contenders import ADAMW, Contender, adamw


def peer_contenders() -> list[Contender]:
    """Everyone's AdamW, their cautious forms, and 8-bit states. pytorch_optimizer's AdamW is torch's own.

    A plain AdamW has to come near torch's; the others have rules of their own, of which only is checked that they move
    every parameter, and that nothing becomes infinite. Time and bytes of those are of another step than AdamW's.
    HeavyBall keeps its state in float32 whatever the parameters are.
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
