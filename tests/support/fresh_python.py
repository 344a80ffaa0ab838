"""Code in a fresh interpreter, for what depends on `sys.path` and on what is imported already."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def python(code: str, cwd: Path, path: Path | None = None) -> str:
    """Return what `code` prints, run in `cwd`, which is first on sys.path, with `path` behind it."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    run = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()
