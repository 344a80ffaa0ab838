"""Measurements as a table and as JSON."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from selective.bench.measure import Measurement


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _ratio(value: float | None) -> str:
    return f"{value:10.2f}" if value is not None else f"{'–':>10}"


def table(measured: Sequence[Measurement]) -> str:
    """One line each: median ms, ratios to torch's foreach and fused AdamW, MiB a step holds beyond its start."""
    width = max(len(m.name) for m in measured)
    lines = [f"{'optimizer':{width}}  {'ms':>8}  {'× foreach':>10}  {'× fused':>10}  {'extra MiB':>9}"]
    for m in measured:
        if m.refused is not None:
            lines.append(f"{m.name:{width}}  no time: {m.refused}")
            continue
        ratios = f"{_ratio(m.versus_foreach)}  {_ratio(m.versus_fused)}"
        lines.append(f"{m.name:{width}}  {m.median * 1e3:8.1f}  {ratios}  {m.extra_bytes / 2**20:9.1f}")
    return "\n".join(lines)


def as_json(measured: Sequence[Measurement], shapes: str) -> dict[str, Any]:
    """All of it, with what is needed to read it later."""
    return {
        "shapes": shapes,
        "torch": torch.__version__,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "measurements": [
            {
                "name": m.name,
                "median_seconds": m.median if m.seconds else None,
                "seconds": m.seconds,
                "versus_foreach": m.versus_foreach,
                "versus_fused": m.versus_fused,
                "extra_bytes": m.extra_bytes,
                "refused": m.refused,
            }
            for m in measured
        ],
    }
