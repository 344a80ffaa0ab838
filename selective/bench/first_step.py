"""Measures the wait before training: `import selective`, wrapping a base, and the first step, on a CPU.

Everything is measured in processes that have just started, because caches, lazy imports and measurements of a base
cost time once in each process.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selective.bench.first_step_child import NOTHING
from selective.bench.fresh_process import command_of, environment_of

CHILD = Path(__file__).with_name("first_step_child.py")
MODELS = ("small", "gpt")
POLICIES = ("Dense", "MGUP", "Cautious", "AlphaConsistency", "Magma", "RandomMask")
OTHER_BASES = ("NAdam", "Adafactor", "own", "own-norm")  # scratch and delta; wrapping measures the last two
CASES = [("AdamW", policy) for policy in POLICIES] + [(base, "MGUP") for base in OTHER_BASES]
MOST = {"import selective": 0.3, "extra": 0.2}  # the limits, in seconds


@dataclass
class FirstStep:
    """One base, model and policy, with the seconds of each round: ours, and those of the base's own first step."""

    base: str
    model: str
    policy: str
    tensors: int = 0
    way: str = ""
    source: str = ""  # the source of our knowledge of the base: "table" or "measured"
    construct: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    base_step: list[float] = field(default_factory=list)
    triton: bool = False  # we imported it

    @property
    def extra(self) -> float:
        """The seconds of construction and first step beyond the base's first step, as median over the rounds."""
        rounds = zip(self.construct, self.step, self.base_step, strict=True)
        return statistics.median(construct + step - base_step for construct, step, base_step in rounds)


@dataclass
class FirstSteps:
    """All measurements, with the seconds of the imports in each process that had them."""

    rounds: int
    clock: str = "perf_counter"
    imports: dict[str, list[float]] = field(default_factory=lambda: {"import torch": [], "import selective": []})
    lines: list[FirstStep] = field(default_factory=list)
    interrupted: bool = False  # some rounds are missing


def measure_first_steps(
    *, rounds: int = 5, threads: int | None = None, clock: str = "perf_counter", models: Sequence[str] = MODELS,
    cases: Sequence[tuple[str, str]] = tuple(CASES), tell: Callable[[str], None] | None = None,
) -> FirstSteps:  # fmt: skip
    """Time each case in a process of its own, `rounds` times in turns, beside the base alone in another process.

    `clock` names a function of Python's `time`; "process_time" is for a machine that is busy with other things. The
    first process does not count: it compiles Python's files, as an installation does. On Ctrl-C the rounds that are
    complete are returned, if there is at least one.
    """
    first_steps = FirstSteps(rounds, clock)
    settings = [str(threads or ""), clock]
    first_steps.lines = [FirstStep(base, model, policy) for model in models for base, policy in cases]
    _in_a_fresh_process("AdamW", "small", "MGUP", *settings)
    try:
        for number in range(rounds):
            _one_round(first_steps, settings)
            if tell is not None:
                tell(f"round {number + 1} of {rounds}")
    except KeyboardInterrupt:
        if not all(line.step for line in first_steps.lines):
            raise
        first_steps.interrupted = True
    return first_steps


def _one_round(first_steps: FirstSteps, settings: Sequence[str]) -> None:
    alone: dict[tuple[str, str], float] = {}
    for line in first_steps.lines:
        which = line.base, line.model
        if which not in alone:
            alone[which] = _in_a_fresh_process(*which, NOTHING, *settings)["step"]
        _take(first_steps, line, _in_a_fresh_process(*which, line.policy, *settings), alone[which])


def _take(first_steps: FirstSteps, line: FirstStep, child_report: dict[str, Any], base_step: float) -> None:
    for name, seconds in first_steps.imports.items():
        seconds.append(child_report[name])
    line.tensors, line.way, line.source = child_report["tensors"], child_report["way"], child_report["source"]
    line.construct.append(child_report["construct"])
    line.step.append(child_report["step"])
    line.base_step.append(base_step)
    line.triton |= child_report["triton"]


def _in_a_fresh_process(base: str, model: str, policy: str, *settings: str) -> dict[str, Any]:
    """The report of a child, which imports from where this process does, and not from beside its own file."""
    command = command_of(CHILD, base, model, policy, *settings)
    done = subprocess.run(command, capture_output=True, text=True, env=environment_of())
    if done.returncode:
        raise RuntimeError(f"first step of {base}, {model}, {policy}: {done.stderr.strip() or done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def first_step_table(first_steps: FirstSteps) -> str:
    """A table with a line for each case, in milliseconds."""
    medians = {name: statistics.median(seconds) for name, seconds in first_steps.imports.items()}
    ours, most = medians["import selective"], MOST["import selective"]
    lines = [
        f"import torch {1e3 * medians['import torch']:.0f} ms; import selective {1e3 * ours:.0f} ms more"
        f"{_missed(ours, most)} (must be under {1e3 * most:.0f})",
        f"{'base':10} {'model':>5} {'tensors':>7}  {'policy':17} {'captured':18} {'base ms':>7} {'construct':>9} "
        f"{'step':>6} {'extra':>6}",
    ]
    for line in first_steps.lines:
        base, construct, step = (1e3 * statistics.median(s) for s in (line.base_step, line.construct, line.step))
        way = line.way if line.source == "table" else f"{line.way}, {line.source}"
        lines.append(
            f"{line.base:10} {line.model:>5} {line.tensors:7}  {line.policy:17} {way:18} {base:7.1f} {construct:9.1f} "
            f"{step:6.1f} {1e3 * line.extra:6.1f}{_missed(line.extra, MOST['extra'])}"
            f"{'  imports triton' if line.triton else ''}"
        )
    lines.append(
        f"medians of {first_steps.rounds} fresh processes, by {first_steps.clock}; extra: construct + step beyond the "
        f"base's own first step (must be under {1e3 * MOST['extra']:.0f} ms)"
    )
    return "\n".join(lines)


def _missed(seconds: float, most: float) -> str:
    return "" if seconds < most else " MISSED"


def first_steps_as_json(first_steps: FirstSteps) -> dict[str, Any]:
    """All seconds and their medians, as plain JSON data."""
    imports = {n: {"median_seconds": statistics.median(s), "seconds": s} for n, s in first_steps.imports.items()}
    lines = [{**vars(line), "extra_seconds": line.extra} for line in first_steps.lines]
    return {
        "rounds": first_steps.rounds,
        "clock": first_steps.clock,
        "interrupted": first_steps.interrupted,
        "most_seconds": MOST,
        "imports": imports,
        "first_steps": lines,
    }
