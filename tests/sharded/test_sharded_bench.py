"""scripts/sharded_bench.py on two ranks, with tiny shapes: it counts what docs/guides/sharded.md says. No times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "sharded_bench.py"


def rows(tmp_path: Path, *arguments: str) -> dict[tuple[int, str, str], dict[str, Any]]:
    out = tmp_path / "rows.json"
    command = [sys.executable, str(SCRIPT), "--cpu", "--steps", "1", "--warmup", "1", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(out.read_text())["rows"]
    assert all("step_ms" not in row for row in found)  # a CPU's times are not reported
    assert done.stdout.count("\n| ") == len(found) + 2
    return {(row["processes"], row["layout"], row["contender"]): row for row in found}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_counts_of_one_and_two_ranks(tmp_path: Path) -> None:
    found = rows(tmp_path, "--processes", "1", "2", "--layout", "fsdp", "ddp", "--model", "tiny", "--batch", "1")
    tensors, matrices = 12, 4 * 32 * 32 + 3 * 32 * 48 + 2 * 64 * 32  # embedding, head, a norm, and nine of the block
    wanted = {
        "torch AdamW": (0, 0),
        "agreement": (0, 0),
        "agreement, mean-preserving": (1, 160 * tensors),
        "exact top-K": (5, 4104 * tensors),
        "random": (0, 0),
        "rotated, unsharded side": (0, 0),
    }
    for name, sent in wanted.items():
        row = found[2, "fsdp", name]
        assert (row["collectives"], row["bytes"]) == sent, name
    assert found[2, "fsdp", "rotated, gathered"]["bytes"] == 3 * 4 * matrices
    assert {row["bytes"] for key, row in found.items() if key[0] == 1 or key[1] == "ddp"} == {0}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_shapes_without_a_model(tmp_path: Path) -> None:
    shapes = ["--shapes", "conv", "--tensors", "6", "--statistics", "--contender", "agreement", "exact top-K"]
    found = rows(tmp_path, "--processes", "2", "--layout", "hsdp", *shapes)
    counts = {name: row["collectives"] for (_, _, name), row in found.items()}
    assert counts == {
        "torch AdamW": 0, "agreement": 0, "agreement, statistics": 1, "exact top-K": 5, "exact top-K, statistics": 5,
    }  # fmt: skip
