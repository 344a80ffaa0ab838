"""The global random generators of Python, NumPy (if it is imported) and torch: put back after others have drawn."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def generators_restored() -> Iterator[None]:
    """Put the global generators back at the end of the block. Those of GPUs as well, if CUDA was initialised before."""
    numpy = sys.modules.get("numpy")
    pythons, torchs = random.getstate(), torch.get_rng_state()
    numpys = None if numpy is None else numpy.random.get_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(pythons)
        torch.set_rng_state(torchs)
        if numpy is not None:
            numpy.random.set_state(numpys)
        if gpus is not None:
            torch.cuda.set_rng_state_all(gpus)


def seed_all(number: int, *, start_cuda: bool = False) -> None:
    """Seed the global generators. Those of GPUs only if CUDA is initialised, or if it may be started for that.

    `torch.manual_seed` is not used: where CUDA is unused it keeps each call, with the stack, for a start that may never
    come.
    """
    random.seed(number)
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized() or (start_cuda and torch.cuda.is_available()):
        torch.cuda.manual_seed_all(number)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(number % 2**32)
