"""The global random generators, which models, batches and losses of a task may draw from."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_generators(seed: int, step: int | None) -> None:
    """Seed the generators of Python, NumPy (if it is imported) and torch (CPU and CUDA) from a run's seed and the step.

    So a resumed run draws what it would have drawn, and every contender draws the same, even beside an optimizer that
    draws too. A step of None is the start of a run, or an evaluation.
    """
    digest = hashlib.sha256(f"generators {seed} {step}".encode()).digest()
    number = int.from_bytes(digest[:8], "little") >> 1
    random.seed(number)
    # Not `torch.manual_seed`: where CUDA is unused it keeps each call, with the stack, for a start that never comes.
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized() or (step is None and torch.cuda.is_available()):
        torch.cuda.manual_seed_all(number)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(number % 2**32)


@contextmanager
def generators_restored() -> Iterator[None]:
    """Put the global generators back at the end, so that a comparison draws nothing from its caller's."""
    numpy = sys.modules.get("numpy")
    ours, torchs = random.getstate(), torch.get_rng_state()
    numpys = None if numpy is None else numpy.random.get_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(ours)
        torch.set_rng_state(torchs)
        if numpy is not None:
            numpy.random.set_state(numpys)
        if gpus is not None:
            torch.cuda.set_rng_state_all(gpus)
