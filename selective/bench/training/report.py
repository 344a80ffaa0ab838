"""Writes the measurements of rows as a Markdown table, and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from selective.bench.environment import environment
from selective.bench.training.records import RowMeasurement, TrainingResult

NONE = "none"  # a column of the device, on a CPU


def _number(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def _ms(seconds: float | None, digits: int = 2) -> str:
    return _number(None if seconds is None else 1e3 * seconds, digits)


def _launches(m: RowMeasurement) -> str:
    if m.launches is None:
        return NONE
    others = m.launches["copies"] + m.launches["fills"]
    return f"{m.launches['kernels']:.0f}" + (f" + {others:.0f}" if others else "")


def _mib(value: int | None) -> str:
    return NONE if value is None else f"{value / 2**20:.0f}"


def _first(m: RowMeasurement) -> str:
    return f"{_ms(m.first_seconds, 0)} + {_ms(m.warm_up_seconds, 0)}"


def columns() -> dict[str, Callable[[RowMeasurement], str]]:
    """The columns of the table; ratios are to torch's fused step of the same run."""
    return {
        "wall ms": lambda m: _ms(m.median),
        "× fused": lambda m: _number(m.versus_fused, 2),
        "host ms": lambda m: _ms(m.host_seconds),
        "× fused's": lambda m: _number(m.host_versus_fused, 2),
        "host ms, statistics": lambda m: _ms(m.host_with_statistics),
        "device ms": lambda m: _ms(m.device_seconds, 3),
        "launches": _launches,
        "peak MiB": lambda m: _mib(m.peak_bytes),
        "first ms": _first,
        "cold ms": lambda m: _ms(m.cold_seconds, 0),
        "captured": lambda m: " ".join(m.captures) or NONE,
    }


LEGEND = (
    "wall: a step of {steps} in a row without synchronising, the median of the rounds; × fused: the median ratio to "
    "torch's fused step of that round; host: the median time until step() returns, with an idle device, without and "
    "with statistics; device: the sum of kernels, copies and fills; launches: kernels + copies and fills; peak: beyond "
    "parameters, gradients and state; first: the first step + the others until it was warm; cold: the first step in a "
    "process that had to compile its kernels, if nothing had before."
)


def training_table(result: TrainingResult) -> str:
    """A Markdown table with a line for each row, or the reason why it has no time."""
    cells_of = columns()
    head = ["step", *cells_of]
    rows = [[m.name, *(cell(m) for cell in cells_of.values())] for m in result.measurements if m.seconds]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    widths[0] = max([widths[0], *(len(m.name) for m in result.measurements)])

    def line(cells: Sequence[str]) -> str:
        aligned = [f"{cells[0]:{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(cells[1:], widths[1:], strict=False))]
        return f"| {' | '.join(aligned)} |"

    by_name = iter(rows)
    lines = [line(head), line(["---"] + ["--:"] * len(cells_of))]
    for m in result.measurements:
        lines.append(line(next(by_name)) if m.seconds else f"| {m.name:{widths[0]}} | {why_no_time(m)} |")
    steps = sorted({m.steps_in_a_row for m in result.measurements if m.seconds})
    return "\n".join([*lines, "", LEGEND.format(steps=" or ".join(map(str, steps)) or "some")])


def training_heading(result: TrainingResult) -> str:
    """The line above the table: the model, the rounds, and where gradients lie."""
    gradients = "at new addresses in each step" if result.new_gradients else "at the same addresses"
    if result.untouched:
        gradients += f", {result.untouched:.0%} of an embedding's rows have none"
    return (
        f"{result.model}: {result.elements / 1e6:,.1f} M parameters in {result.tensors} tensors, float32, "
        f"{result.rounds} rounds, gradients {gradients}" + (", interrupted" if result.interrupted else "")
    )


def why_no_time(m: RowMeasurement) -> str:
    """The outcome and the first line of the reason."""
    return f"no time ({m.outcome}): {(m.refused or '').strip().partition(chr(10))[0]}"


def one_line(m: RowMeasurement) -> str:
    """A row in words, for the terminal while it runs."""
    if not m.seconds:
        return f"{m.name}: {why_no_time(m)}"
    device = "" if m.device_seconds is None else f", device {_ms(m.device_seconds, 3)} ms, launches {_launches(m)}"
    host = "" if m.host_seconds is None else f", host {_ms(m.host_seconds)} ms"
    return f"{m.name}: {_ms(m.median)} ms, {_number(m.versus_fused, 2)} × fused{host}{device}, first {_first(m)} ms"


def training_json(results: Sequence[TrainingResult], device: str) -> dict[str, Any]:
    """All results as plain JSON data, with the facts about machine and versions."""
    return {**environment(device), "training": [_result(result) for result in results]}


def _result(result: TrainingResult) -> dict[str, Any]:
    rows = [
        {
            **asdict(m),
            "median_seconds": m.median if m.seconds else None,
            "versus_fused": m.versus_fused,
            "host_seconds": m.host_seconds,
            "host_versus_fused": m.host_versus_fused,
        }
        for m in result.measurements
    ]
    return {**asdict(result), "measurements": rows}
