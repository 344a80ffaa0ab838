"""Writes the measurements of rotations as a table."""

from __future__ import annotations

from selective.bench.rotations import Rotations


def rotation_table(result: Rotations) -> str:
    """The measurements as a table for the terminal, with a line for each."""
    lines = [
        f"{result.shapes}: {result.matrices} matrices of {result.rotated / 1e6:,.1f} M parameters are rotated on their "
        f"smaller side, of {result.elements / 1e6:,.1f} M; around AdamW(fused=True), float32",
        f"{'what':24}{'ms':>10}",
    ]
    named = {line.name: line for line in result.lines}
    for line in result.lines:
        remarks = [f"{name} {_fact(name, value)}" for name, value in line.facts.items()]
        kind, *rest = line.name.split(" ")
        cholesky = named.get(" ".join(["refresh", "cholesky", *rest[1:]])) if kind == "refresh" else None
        if cholesky not in (None, line):
            remarks.append(f"{line.seconds / cholesky.seconds:.1f} × cholesky's")
            remarks.append(f"its bases {line.facts['bases'] / cholesky.facts['bases']:.1f} ×")
        lines.append(f"{line.name:24}{1e3 * line.seconds:10.2f}  {', '.join(remarks)}".rstrip())
    return "\n".join(lines)


def _fact(name: str, value: float) -> str:
    if name in ("step", "at_once", "bases"):
        return f"{1e3 * value:.2f} ms"
    return f"{value:,.0f}" if name in ("bytes", "documented") else f"{value:.2f} ×"
