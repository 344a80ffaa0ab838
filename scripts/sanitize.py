"""Runs the GPU tests under NVIDIA's compute-sanitizer: accesses out of bounds, races, uninitialised memory.

    python scripts/sanitize.py --jobs 12 tests/kernels/test_gpu_top_k.py -k "not large"

Everything after the options goes to pytest. The tests are split over `--jobs` processes, each under a sanitizer of its
own; with pytest-xdist the sanitizer would follow every compiler that Triton starts. torch's caching allocator is off,
because an access beyond a tensor could otherwise hit the same larger block. Run the same tests without a sanitizer
first: kernels then come from Triton's cache, and their compilation is not slowed down.

Exit code 0: every process ran at least one test, no test failed, no error was found.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error")
PASSED = re.compile(r"(\d+) passed")


def collected(arguments: list[str]) -> list[str]:
    """The ids of the tests that pytest would run."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--no-header", "--no-summary", *arguments]
    listing = subprocess.run(command, capture_output=True, text=True)
    if listing.returncode != 0:
        sys.exit(f"pytest collects nothing:\n{listing.stdout}{listing.stderr}")
    return [line for line in listing.stdout.splitlines() if "::" in line]


def verdict(log: str, output: str, code: int) -> str | None:
    """The fault of one process's run, in words; None if there is none."""
    errors = [int(n) for n in SUMMARY.findall(log)]
    if not errors:
        return "the sanitizer said nothing"
    if sum(errors):
        return f"{sum(errors)} errors"
    if code != 0:
        return f"pytest ended with {code}"
    return None if PASSED.search(output) else "no test ran"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tool", default="memcheck", choices=["memcheck", "racecheck", "initcheck", "synccheck"])
    parser.add_argument("--jobs", type=int, default=8, help="processes at the same time")
    parser.add_argument("--logs", type=Path, default=None, help="keep what the processes wrote in this folder")
    options, rest = parser.parse_known_args()
    tests = collected(rest or ["tests/kernels", "-k", "test_gpu"])
    folder = options.logs or Path(tempfile.mkdtemp(prefix="sanitize-"))
    folder.mkdir(parents=True, exist_ok=True)
    parts = [part for part in (tests[i :: options.jobs] for i in range(options.jobs)) if part]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    running = []
    for number, part in enumerate(parts):
        log, output = folder / f"{number}.sanitizer", folder / f"{number}.pytest"
        command = ["compute-sanitizer", "--tool", options.tool, "--error-exitcode", "77", "--log-file", str(log)]
        command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "0", *part]
        with output.open("w") as stream:
            running.append((log, output, subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)))
    failed = 0
    for log, output, process in running:
        process.wait()
        wrong = verdict(log.read_text() if log.exists() else "", output.read_text(), process.returncode)
        failed += wrong is not None
        if wrong is not None:
            print(f"{log}: {wrong}; {output} has the tests")
    print(f"{options.tool}: {len(tests)} tests in {len(parts)} processes, {len(parts) - failed} of them clean")
    return 1 if failed or not parts else 0


if __name__ == "__main__":
    sys.exit(main())
