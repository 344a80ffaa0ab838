"""examples/train_fsdp.py as it is meant: under torchrun on two ranks, stopped, and gone on with by one alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_fsdp.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def losses(launcher: list[str], folder: Path, steps: int, *more: str) -> dict[int, float]:
    """The loss of each step that was taken."""
    size = ["--width", "32", "--layers", "1", "--context", "16", "--batch", "4", "--every", "2"]
    command = [sys.executable, *launcher, str(EXAMPLE), *size, "--steps", str(steps), "--folder", str(folder), *more]
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.strip().endswith("ok")
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+) loss (\S+)", done.stdout)}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_and_then_one(tmp_path: Path) -> None:
    """The same losses as one process from the start, to what sums in another order make of float32 and of bases."""
    alone = losses([], tmp_path / "alone", 6, "--rotate")
    both = losses(TORCHRUN, tmp_path / "both", 4, "--rotate")
    rest = losses([], tmp_path / "both", 6, "--rotate")
    assert list(both) == [1, 2, 3, 4] and list(rest) == [5, 6]
    for step, loss in {**both, **rest}.items():
        assert loss == pytest.approx(alone[step], abs=0.02), step
    assert alone[6] < alone[1] - 0.5  # far more than that


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_flag(tmp_path: Path) -> None:
    """bfloat16 and recomputed activations: another rounding, the same training. Replicas go on from shards."""
    found = losses(TORCHRUN, tmp_path / "run", 4, "--bfloat16", "--recompute", "--policy", "Cautious")
    assert found[4] < found[1]
    more = ["--replicas", "2", "--asynchronous", "--policy", "Cautious"]
    assert list(losses(TORCHRUN, tmp_path / "run", 6, *more)) == [5, 6]
