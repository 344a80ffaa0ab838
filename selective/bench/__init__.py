"""What a step costs: time and memory of optimizers side by side, in one process, in interleaved rounds.

    python -m selective.bench --shapes transformer-30m
    python -m selective.bench --shapes many-small --only agreement --json out.json

An optimizer whose result differs from its reference is refused a time.
"""

from selective.bench.contenders import Contender, selective_contenders, standard_contenders, torch_contenders
from selective.bench.measure import Measurement, Mismatch, run
from selective.bench.report import as_json, table
from selective.bench.shapes import SHAPES

__all__ = [
    "SHAPES",
    "Contender",
    "Measurement",
    "Mismatch",
    "as_json",
    "run",
    "selective_contenders",
    "standard_contenders",
    "table",
    "torch_contenders",
]
