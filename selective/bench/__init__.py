"""Measures the cost of a step: time, bandwidth, memory and launches of optimizers, beside torch's fused AdamW.

    python -m selective.bench --shapes transformer-30m
    python -m selective.bench --device cuda --shapes llama-1b many-small --only MGUP --json out.json

An optimizer whose result differs from its reference gets no time.
"""

from selective.bench.check import Mismatch
from selective.bench.contenders import Contender, selective_contenders, standard_contenders, torch_contenders
from selective.bench.measure import Measurement, Result, run
from selective.bench.peers import peer_contenders
from selective.bench.promised import Promise, promised_bytes
from selective.bench.report import as_json, heading, table
from selective.bench.shapes import SHAPES

__all__ = [
    "SHAPES",
    "Contender",
    "Measurement",
    "Mismatch",
    "Promise",
    "Result",
    "as_json",
    "heading",
    "peer_contenders",
    "promised_bytes",
    "run",
    "selective_contenders",
    "standard_contenders",
    "table",
    "torch_contenders",
]
