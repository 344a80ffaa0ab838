"""scripts/sharded_bench.py on two ranks, with tiny shapes: it counts what docs/guides/sharded.md says. No times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "sharded_bench.py"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_counts_of_two_ranks(tmp_path: Path) -> None:
    size = ["--layers", "1", "--width", "16", "--heads", "2", "--context", "8", "--batch", "2", "--steps", "3"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(SCRIPT), *size, "--warmup", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    about, *rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = {row["contender"]: (row["collectives"], row["bytes"]) for row in rows}
    tensors = 9  # embedding, head, a norm, and six of the block
    assert about["ranks"] == 2 and about["steps"] == 3
    assert found == {
        "torch AdamW": (0, 0),
        "agreement": (0, 0),
        "agreement, mean-preserving": (1, 160 * tensors),
        "exact top-K": (5, 4104 * tensors),
        "rotated, unsharded side": (0, 0),
    }
    assert all(row["step_ms"] > 0 and row["step_ratio"] > 0 for row in rows)
