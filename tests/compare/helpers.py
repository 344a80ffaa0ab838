"""Tiny comparisons and synthetic records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from selective.compare import CompareConfig, build
from selective.compare.config import merge
from selective.compare.contenders import Run, contenders, runs
from selective.compare.setup import prepare
from selective.compare.train import Record, Trainer, new_record

TINY: dict[str, Any] = {
    "steps": 6,
    "lr": [1e-2],
    "seeds": [0],
    "controls": False,
    "model": {"layers": 1, "width": 8, "heads": 2, "context": 8},
    "loop": {"batch": 2, "evaluate_windows": 4, "evaluate_every": 2, "checkpoint_every": 100},
    "workers": 1,
}


def text_file(folder: Path, size: int = 4000) -> Path:
    """Bytes with some structure, the same each time."""
    path = folder / "text.txt"
    numbers = torch.randint(97, 105, (size // 2,), generator=torch.Generator().manual_seed(1))
    path.write_bytes(bytes(numbers.repeat_interleave(2).tolist()))
    return path


def policy_file(folder: Path) -> None:
    """A module `my_policies` with a policy of a user's own, for `imports`."""
    (folder / "my_policies.py").write_text(
        "import torch\nfrom selective import Policy\n\n\nclass HalfOfIt(Policy):\n    rest: float = 0.5\n\n"
        "    def mask(self, view):\n        return torch.where(view.update * view.grad > 0, 1.0, self.rest)\n"
    )


def tiny(folder: Path, **changes: Any) -> CompareConfig:
    """A comparison that trains in a fraction of a second; `changes` are merged in."""
    return build(merge(merge(TINY, {"data": {"file": str(text_file(folder))}}), changes))


def trainer(config: CompareConfig, index: int = 0) -> Trainer:
    return Trainer(prepare(config), runs(config)[index])


def never() -> bool:
    return False


def ignore(*_: Any) -> None:
    """A listener that does not care."""


def records(config: CompareConfig, losses: Mapping[tuple[int, float], Sequence[float | None]]) -> list[Record]:
    """Finished runs with these final losses by (contender, lr), one for each seed; None: diverged.

    Each curve falls in a line from 4 at step 0 to the final loss at the last step.
    """
    made = []
    by_index = {c.index: c for c in contenders(config)}
    for (index, lr), finals in losses.items():
        for seed, final in zip(config.seeds, finals, strict=True):
            record = new_record(Run(by_index[index], lr, seed))
            record.update(complete=True, steps_done=config.steps, diverged=final is None, optimizer_ms=[1.0, 2.0, 9.0])
            end = 4.0 if final is None else final
            record["validation"] = {"step": [0, config.steps], "loss": [4.0, end], "lr": [lr, lr]}
            made.append(record)
    return made
