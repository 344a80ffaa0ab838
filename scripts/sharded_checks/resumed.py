"""`examples/train_fsdp.py`, killed on all processes, goes on from its last checkpoint on fewer.

The batches of a step are the same for any number of processes, and gradients are summed in another order. What that
does to the losses is measured: the undisturbed runs on one process and on all differ by it. A resumed run may differ
from the undisturbed run on one by `TIMES` as much, and by the last digit that is printed. On as many processes as
before it has to print the same digits. (Not on GPUs, where torch adds an embedding's gradient in any order.)
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from .processes import Processes
from .results import Result

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_fsdp.py"
SIZE = ["--width", "32", "--layers", "1", "--context", "16", "--batch", "8", "--every", "3", "--lr", "1e-3"]
STEPS, KILLED_AT = 12, 8  # after the checkpoint of step 6, and before that of step 9
TIMES, LAST_DIGIT = 4, 1e-6
SECONDS = 240
Losses = dict[int, float]


def resumed(processes: int, hsdp: bool, asynchronous: bool, cpu: bool) -> Iterator[Result]:
    """A result for each smaller number of processes, and for the same one."""
    more = ["--asynchronous"] if asynchronous else []
    more += ["--cpu"] if cpu else []
    layout = "hsdp" if hsdp else "fsdp"
    saves = "asynchronous saves" if asynchronous else "saves"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def train(count: int, where: str, killed_at: int | None = None) -> Losses:
            flags = ["--replicas", str(count // 2)] if hsdp and count > 1 else []
            return losses(count, folder / where, [*more, *flags], killed_at)

        one, all_ = train(1, "one"), train(processes, "all")
        spread = max(abs(one[step] - all_[step]) for step in one)
        same_order = cpu or not torch.cuda.is_available()
        before = train(processes, "killed", KILLED_AT)
        for count in sorted({processes, max(processes // 2, 1), 1}, reverse=True):
            shutil.copytree(folder / "killed", folder / f"on-{count}")
            after = train(count, f"on-{count}")
            same = count == processes
            allowed = 0.0 if same and same_order else TIMES * spread + LAST_DIGIT
            case = f"{saves}, killed on {processes}, resumed on {count}"
            yield _judged(layout, case, before, after, all_ if same else one, allowed)


def _judged(layout: str, case: str, before: Losses, after: Losses, undisturbed: Losses, allowed: float) -> Result:
    first = min(after, default=0)
    apart = max((abs(loss - undisturbed[step]) for step, loss in after.items()), default=0.0)
    goes_on = 1 < first <= max(before) and max(after, default=0) == STEPS
    said = f"killed after step {max(before)}, went on with {first}, losses {apart:.1e} apart, at most {allowed:.1e}"
    numbers = {"killed_after": max(before), "first_step": first, "apart": apart, "allowed": allowed}
    return Result("resumed", layout, case, goes_on and apart <= allowed, said, numbers)


def losses(processes: int, folder: Path, more: list[str], killed_at: int | None = None) -> Losses:
    """Train to the end, or kill all processes as soon as this step is printed. Returns the losses of the steps."""
    command = [sys.executable, str(EXAMPLE), *SIZE, "--steps", str(STEPS), "--folder", str(folder), *more]
    printed = folder.parent / f"{folder.name}-{time.monotonic_ns()}.log"
    with printed.open("w") as output:
        run = Processes(command, processes, output)
        if killed_at is None:
            code = run.wait(SECONDS)
            if code:
                raise RuntimeError(f"{' '.join(command)}, {processes} processes: {code}\n{printed.read_text()[-3000:]}")
        else:
            _kill_at(run, printed, killed_at)
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+) loss (\S+)\n", printed.read_text())}


def _kill_at(run: Processes, printed: Path, step: int) -> None:
    end = time.monotonic() + SECONDS
    try:
        while f"step {step} loss" not in printed.read_text():
            if any(process.poll() is not None for process in run.processes) or time.monotonic() > end:
                raise RuntimeError(f"it has ended before step {step}:\n{printed.read_text()[-3000:]}")
            time.sleep(0.01)
    finally:
        run.kill()
