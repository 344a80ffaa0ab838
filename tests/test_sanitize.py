"""scripts/sanitize.py, with a sanitizer that is none: how tests are handed out, and what is not called clean."""

from __future__ import annotations

import importlib.util
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "sanitize.py"
SANITIZER = """#!/bin/sh
while [ "$1" != "--log-file" ]; do shift; done
echo "========= ERROR SUMMARY: $FOUND errors" > "$2"
shift 2
exec "$@"
"""


def run(tmp_path: Path, found: str, *tests: str) -> subprocess.CompletedProcess[str]:
    fake = tmp_path / "bin" / "compute-sanitizer"
    fake.parent.mkdir()
    fake.write_text(SANITIZER)
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_few.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('i', range(5))\ndef test_good(i): pass\n"
        "def test_bad(): assert False\n"
        "@pytest.mark.skip\ndef test_skipped(): pass\n"
    )
    quick = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "pytest_timeout"}
    environment = {**os.environ, **quick, "PATH": f"{fake.parent}:{os.environ['PATH']}", "FOUND": found}
    command = [sys.executable, str(SCRIPT), "--jobs", "2", "--logs", str(tmp_path / "logs"), "test_few.py", *tests]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)


@pytest.mark.parametrize(
    ("found", "tests", "code", "says"),
    [
        ("0", "good", 0, "5 tests in 2 processes, 2 of them clean"),
        ("3", "good", 1, "3 errors"),
        ("0", "bad", 1, "pytest ended with 1"),
        ("0", "skipped", 1, "no test ran"),
        ("0", "nothing_of_that_name", 1, "pytest collects nothing"),
    ],
)
def test_what_is_clean(tmp_path, found, tests, code, says):
    result = run(tmp_path, found, "-k", tests)
    assert result.returncode == code, result.stdout + result.stderr
    assert says in result.stdout + result.stderr


def test_a_silent_sanitizer_is_not_clean():
    spec = importlib.util.spec_from_file_location("sanitize", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.verdict("", "1 passed", 0) == "the sanitizer said nothing"
    assert module.verdict("ERROR SUMMARY: 0 errors", "1 passed", 0) is None
