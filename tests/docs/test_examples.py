"""examples/*.py and docs/pictures/*.py run as a reader runs them: a fresh interpreter, an empty folder, no warnings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from optional import THEIR_WARNINGS, missing

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PICTURES = sorted((ROOT / "docs" / "pictures").glob("*.py"))
NEEDED = {  # what an example imports beyond the dependencies; skipped where it is missing
    "accelerate_loop.py": ["accelerate"],
    "huggingface_trainer.py": ["transformers", "accelerate"],
    "lightning_module.py": ["lightning"],
    "task_huggingface.py": ["transformers"],
}


def test_there_are_examples() -> None:
    assert {"custom_policy.py", "finetune_groups.py", "task_regression.py", "task_vision.py", *NEEDED} <= {
        path.name for path in EXAMPLES
    }


def run(path: Path, folder: Path, *arguments: str) -> str:
    """The text that the script printed."""
    alone = ["-P"] if sys.version_info >= (3, 11) else []
    theirs = [option for message in THEIR_WARNINGS for option in ("-W", f"ignore:{message}")]
    command = [sys.executable, *alone, "-W", "error", *theirs, str(path), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_example(path: Path, tmp_path: Path) -> None:
    lacking = missing(NEEDED.get(path.name, []))
    if lacking:
        pytest.skip(f"needs {', '.join(lacking)}")
    printed = run(path, tmp_path)
    assert printed.strip().endswith("ok"), printed


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=[] if p.name == "demo.py" else pytest.mark.slow, id=p.name) for p in PICTURES]
)
def test_picture_can_be_drawn_again(path: Path, tmp_path: Path) -> None:
    assert path.with_suffix(".png").exists()
    run(path, tmp_path, "again.png")
    assert (tmp_path / "again.png").stat().st_size > 10_000
