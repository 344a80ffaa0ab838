"""The global random generators, which models, batches and losses of a task may draw from."""

from __future__ import annotations

import hashlib

from selective.base.generators import seed_all


def seed_generators(seed: int, step: int | None) -> None:
    """Seed the generators of Python, NumPy (if it is imported) and torch (CPU and CUDA) from a run's seed and the step.

    So a resumed run draws what it would have drawn, and every contender draws the same, even beside an optimizer that
    draws too. A step of None is the start of a run, or an evaluation.
    """
    digest = hashlib.sha256(f"generators {seed} {step}".encode()).digest()
    seed_all(int.from_bytes(digest[:8], "little") >> 1, start_cuda=step is None)
