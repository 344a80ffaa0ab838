"""examples/*.py and docs/pictures/*.py run as a reader runs them: an interpreter, an empty folder, no warnings.

The interpreter is a fork of one that has imported torch and selective; in the slow lane it is a fresh one.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from forked_scripts import ForkedScripts
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
    """The text that the script printed, in a fresh interpreter."""
    alone = ["-P"] if sys.version_info >= (3, 11) else []
    theirs = [option for message in THEIR_WARNINGS for option in ("-W", f"ignore:{message}")]
    command = [sys.executable, *alone, "-W", "error", *theirs, str(path), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_forked(scripts: ForkedScripts, path: Path, folder: Path, *arguments: str) -> str:
    """The text that the script printed, in a fork."""
    code, printed, errors = scripts.run(path, folder, *arguments)
    assert code == 0, errors
    return printed


def skip_if_missing(path: Path) -> None:
    lacking = missing(NEEDED.get(path.name, []))
    if lacking:
        pytest.skip(f"needs {', '.join(lacking)}")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_example(path: Path, forked_scripts: ForkedScripts, tmp_path: Path) -> None:
    skip_if_missing(path)
    printed = run_forked(forked_scripts, path, tmp_path)
    assert printed.strip().endswith("ok"), printed


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_example_in_a_fresh_interpreter(path: Path, tmp_path: Path) -> None:
    skip_if_missing(path)
    printed = run(path, tmp_path)
    assert printed.strip().endswith("ok"), printed


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import warnings\nwarnings.warn('old')", "UserWarning: old"),
        ("import sys\nsys.exit('no')", "no"),
        (
            "import atexit, pathlib\natexit.register(lambda: print('late'))\nassert not [*pathlib.Path().iterdir()]",
            "",
        ),
    ],
    ids=["warns", "exits", "ends well"],
)
def test_a_fork_ends_as_an_interpreter_does(
    code: str, said: str, forked_scripts: ForkedScripts, tmp_path: Path
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    (tmp_path / "script.py").write_text(f"{code}\n")
    ended, printed, errors = forked_scripts.run(tmp_path / "script.py", folder)
    assert (ended, said in errors) == (1 if said else 0, True), errors
    assert printed == ("" if said else "late\n")


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=[] if p.name == "demo.py" else pytest.mark.slow, id=p.name) for p in PICTURES]
)
def test_picture_can_be_drawn_again(path: Path, forked_scripts: ForkedScripts, tmp_path: Path) -> None:
    assert path.with_suffix(".png").exists()
    run_forked(forked_scripts, path, tmp_path, "again.png")
    assert (tmp_path / "again.png").stat().st_size > 10_000
