"""Faults of bases in versions of torch that we support, and in the versions of torchao that go with those."""

from __future__ import annotations

from importlib.metadata import version

import torch

# Seen with torch 2.11, mended in 2.13: Adagrad made its state in the constructor only, Adafactor's copies lacked a key.
FAULTS_OF_OLDER_TORCH = {
    "adagrad": {"add_param_group_reaches_the_base", "parameters_may_be_swapped"},
    "adafactor": {"copies_step_as_the_original"},
}


def faults_of_older_torch(base: str) -> set[str]:
    """The conformance checks that this base fails by itself in the installed versions."""
    if base == "torchao-8bit":  # 0.15, which goes with torch 2.9, steps with a tensor as `lr` only
        return {"schedulers_reach_the_base"} if _numbers(version("torchao")) <= (0, 15) else set()
    older = _numbers(torch.__version__) < (2, 13)
    return FAULTS_OF_OLDER_TORCH.get(base, set()) if older else set()


def cuts_strided_shards_evenly_only() -> bool:
    """True if a `_StridedShard` of this torch leaves other parts of an uneven dimension than later versions do.

    We refuse to wrap these: "not what torch.chunk would leave". Seen with torch 2.9, mended in 2.11.
    """
    return _numbers(torch.__version__) < (2, 11)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])
