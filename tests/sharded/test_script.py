"""scripts/sharded.py over gloo: what would run over NCCL where there are GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_comparison_runs_and_agrees() -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(ROOT / "scripts" / "sharded.py"), "--shapes", "conv", "--check", "many-small", "--rounds", "1",
        "--tensors", "6",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert found.returncode == 0, found.stdout + found.stderr
    rows = [line.split(" | ") for line in found.stdout.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 9, found.stdout
    assert [row[-1].rstrip(" |") for row in rows] == ["-"] + ["yes"] * 8
    assert [int(row[4]) for row in rows] == [0, 0, 1, 0, 1, 1, 1, 5, 5]
