"""Writes measurements as a table and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from selective.bench.environment import environment, small_for_cache
from selective.bench.measure import Measurement, Result
from selective.bench.spread import middle, percentile, ratios, why_unreliable

NOTHING = "–"


def _number(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"


def _mib(value: int | None) -> str:
    return NOTHING if value is None else f"{value / 2**20:.1f}"


def _bytes(m: Measurement) -> str:
    floor, plain = m.promise.floor, m.promise.plain
    return f"{floor:g}" if floor == plain else f"{floor:g} ({plain:g})"


def _launches(m: Measurement) -> str:
    if m.launches is None:
        return NOTHING
    others = m.launches["copies"] + m.launches["fills"]
    return f"{m.launches['kernels']}" + (f" + {others}" if others else "")


def _range(values: Sequence[float], digits: int) -> str:
    low, high = middle(values)
    return f"{low:.{digits}f}–{high:.{digits}f}"


COLUMNS: dict[str, Callable[[Measurement], str]] = {
    "ms": lambda m: _number(m.median * 1e3, 2),
    "(range)": lambda m: _range([seconds * 1e3 for seconds in m.seconds], 2),
    "× fused": lambda m: _number(m.versus_fused, 3),
    "(its range)": lambda m: _range(ratios(m), 2),
    "× foreach": lambda m: _number(m.versus_foreach, 2),
    "B/param": _bytes,
    "GB/s": lambda m: _number(m.bytes_per_second / 1e9, 0 if m.bytes_per_second > 1e11 else 1),
    "× floor": lambda m: _number(m.median / m.floor_seconds, 2),
    "extra MiB": lambda m: _mib(m.extra_bytes),
    "extra B/param": lambda m: _number(None if m.extra_bytes is None else m.extra_bytes / m.elements, 2),
    "kept MiB": lambda m: _mib(m.kept_bytes),
    "launches": _launches,
    "host ms": lambda m: _number(None if m.host_seconds is None else m.host_seconds * 1e3, 2),
}
ON_CUDA = ("kept MiB", "launches", "host ms")
LEGEND = (
    "ranges: of the middle rounds, from the 20th to the 80th percentile;\n"
    "B/param: bytes that the step promises to move (in brackets, with what its plain way reads twice);\n"
    "GB/s: the former over the time; × floor: the time over that of the former at the copy's bandwidth"
)
CUDA_LEGEND = (
    ";\nkept: between steps, beyond torch's state; launches: kernels + copies and fills; host ms: of step() alone"
)


def heading(result: Result) -> str:
    """The lines above the table: shapes, dtype, bandwidth of a copy, and the floor that follows from it."""
    lines = [
        f"{result.shapes}: {result.elements / 1e6:,.1f} M parameters in {result.tensors} tensors, "
        f"{str(result.dtype).removeprefix('torch.')}, {result.rounds} rounds",
        f"a copy moves {result.bandwidth / 1e9:,.1f} GB/s (read + written); AdamW's floor at that is "
        f"{result.floor_seconds * 1e3:.2f} ms",
    ]
    if result.device == "cpu":
        lines[-1] += " (which a CPU can be under: a copy also reads what it overwrites, and large caches keep a part)"
    if small_for_cache(result.device, result.floor_seconds * result.bandwidth):
        lines.append("these shapes stay in the cache between steps: GB/s is not that of the memory, and may exceed it")
    return "\n".join(lines)


def table(result: Result) -> str:
    """A table with a line for each contender, or the reason why it has no time; and a warning if they mean little."""
    columns = {name: cell for name, cell in COLUMNS.items() if result.device == "cuda" or name not in ON_CUDA}
    timed = [m for m in result.measurements if m.refused is None]
    rows: list[Sequence[str]] = [list(columns)]
    rows += [[cell(m) for cell in columns.values()] for m in timed]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    name_width = max(len(m.name) for m in [*result.measurements]) if result.measurements else 0
    name_width = max(name_width, len("optimizer"))

    def line(name: str, row: Sequence[str]) -> str:
        return f"{name:{name_width}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True))

    by_name = iter(rows[1:])
    lines = [line("optimizer", rows[0])]
    for m in result.measurements:
        lines.append(line(m.name, next(by_name)) if m.refused is None else f"{m.name:{name_width}}  {_no_time(m)}")
    legend = LEGEND + (CUDA_LEGEND if result.device == "cuda" else "")
    unreliable = why_unreliable(result)
    return "\n".join([*lines, legend, *([] if unreliable is None else [unreliable])])


def _no_time(m: Measurement) -> str:
    reason = (m.refused or "").strip().partition("\n")[0]
    return f"no time ({m.outcome}): {reason}"


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """All results as plain JSON data, with the facts about machine and versions."""
    device = results[0].device if results else "cpu"
    return {**environment(device), "results": [_result(result) for result in results]}


def _result(result: Result) -> dict[str, Any]:
    return {
        "shapes": result.shapes,
        "dtype": str(result.dtype).removeprefix("torch."),
        "tensors": result.tensors,
        "parameters": result.elements,
        "rounds": result.rounds,
        "copy_bytes_per_second": result.bandwidth,
        "floor_seconds": result.floor_seconds,
        "interrupted": result.interrupted,
        "unreliable": why_unreliable(result),
        "measurements": [_measurement(m) for m in result.measurements],
    }


def _measurement(m: Measurement) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": m.name, "outcome": m.outcome, "refused": m.refused}
    entry["promised_bytes"] = {"floor": m.promise.floor, "plain": m.promise.plain}  # for each parameter
    if m.refused is not None:
        return entry
    return {
        **entry,
        "median_seconds": m.median,
        "percentiles_seconds": {f"p{q}": percentile(m.seconds, q) for q in (20, 50, 80)},
        "seconds": m.seconds,
        "fused_seconds": m.fused_seconds,
        "host_seconds": m.host_seconds,
        "versus_fused": m.versus_fused,
        "versus_foreach": m.versus_foreach,
        "versus_floor": m.median / m.floor_seconds,
        "bytes_per_second": m.bytes_per_second,
        "extra_bytes": m.extra_bytes,
        "extra_bytes_per_parameter": None if m.extra_bytes is None else m.extra_bytes / m.elements,
        "kept_bytes": m.kept_bytes,
        "launches": m.launches,
    }
