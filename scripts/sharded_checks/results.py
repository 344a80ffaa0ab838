"""The result of a check: a line on the terminal, and a record in a JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Result:
    """One check of one case in one layout.

    passed: None if the case was not run, with the reason in `said`.
    numbers: what was measured and what is allowed.
    """

    check: str
    layout: str
    case: str
    passed: bool | None
    said: str
    numbers: dict[str, Any] = field(default_factory=dict)
    processes: int = 0

    def __str__(self) -> str:
        word = {True: "ok", False: "FAILED", None: "not run"}[self.passed]
        return f"{word:8}{self.check:12}{self.layout:14}{self.processes} processes  {self.case}: {self.said}"


def agreed(everywhere: Sequence[Result]) -> Result:
    """Join the results of all ranks: that of the first one which failed, or else the first."""
    return next((result for result in everywhere if result.passed is False), everywhere[0])


def about(device: torch.device) -> dict[str, Any]:
    """The machine and the software of a run."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    backend = "nccl" if device.type == "cuda" else "gloo"
    return {"device": name, "backend": backend, "torch": torch.__version__}


def write(file: Path, run: dict[str, Any], results: Sequence[Result]) -> None:
    """Write the results so far. A file that exists is always whole."""
    records = [{**asdict(result), "numbers": _plain(result.numbers)} for result in results]
    temporary = file.with_name(file.name + ".part")
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    temporary.write_text(f'{{"about": {json.dumps(run)},\n"results": [\n{lines}\n]}}\n')
    temporary.replace(file)


def _plain(numbers: dict[str, Any]) -> dict[str, Any]:
    """The numbers without what JSON has no form for: infinities and NaN become text."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}


def read(file: Path) -> tuple[dict[str, Any], list[Result]]:
    """Read a file that `write` wrote."""
    found = json.loads(file.read_text())
    return found["about"], [Result(**record) for record in found["results"]]
