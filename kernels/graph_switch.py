"""The environment variable that switches off the CUDA graphs that a step records by itself."""

from __future__ import annotations

import os

SWITCH = "SELECTIVE_GRAPH"


def switched_off() -> bool:
    """True if the environment says `SELECTIVE_GRAPH=0`: then every launch of a step is made by itself."""
    return os.environ.get(SWITCH, "1") == "0"
