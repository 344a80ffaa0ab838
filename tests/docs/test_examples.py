"""examples/*.py run as a reader runs them: in a fresh interpreter, in an empty folder, warnings are errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


def test_there_are_examples() -> None:
    assert {"custom_policy.py", "finetune_groups.py"} <= {path.name for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_example(path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-W", "error", str(path)] if sys.version_info >= (3, 11) else [
        sys.executable, "-W", "error", str(path)]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("ok"), done.stdout
