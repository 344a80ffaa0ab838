"""Scripts, each run as `python script.py` runs it, in forks of one process that has imported torch and selective.

What a fresh interpreter would spend most of its time on, the import of torch, happens once. Everything else is a
script's own: its folder, arguments, modules, output, and the end of the process. Warnings are errors from the start.
Run as a script, this is the process that forks: it reads a line of JSON for each script, and answers with exit codes.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path


class ForkedScripts:
    """The process that forks, seen from a test. The first script starts it."""

    def __init__(self, ignored: Sequence[str]) -> None:
        """`ignored` are the beginnings of warnings that are no errors."""
        self.ignored = ignored
        self.process: subprocess.Popen[bytes] | None = None
        self.output = Path(tempfile.mkdtemp())

    def run(self, path: Path, folder: Path, *arguments: str) -> tuple[int, str, str]:
        """Run a script in this folder. Returns its exit code, its output, and its errors."""
        if self.process is None:
            alone = ["-P"] if sys.version_info >= (3, 11) else []
            ignored = [option for message in self.ignored for option in ("-W", f"ignore:{message}")]
            command = [sys.executable, *alone, "-W", "error", *ignored, __file__]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert self.process.stdin is not None and self.process.stdout is not None
        request = {"path": str(path), "folder": str(folder), "output": str(self.output), "arguments": arguments}
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        code = int(self.process.stdout.readline())
        return code, (self.output / "out").read_text(), (self.output / "err").read_text()

    def close(self) -> None:
        if self.process is not None:
            self.process.communicate()
            self.process = None
        shutil.rmtree(self.output)


def serve() -> None:
    """Fork for each script, one after the other, until standard input ends."""
    import torch._dynamo  # noqa: F401  # which the first step of an optimizer imports

    import selective  # noqa: F401

    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        for line in sys.stdin:
            request = json.loads(line)
            child = os.fork()
            if child == 0:
                answers.close()
                run_here(**request)
                return  # to the interpreter's own end, in which a script may fail as well
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers)


def run_here(path: str, folder: str, output: str, arguments: list[str]) -> None:
    """Become the process of this script."""
    for number, name in enumerate((os.devnull, f"{output}/out", f"{output}/err")):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC if number else os.O_RDONLY)
        os.dup2(file, number)
        os.close(file)
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(Path(path).parent)
    os.chdir(folder)
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


if __name__ == "__main__":
    serve()
