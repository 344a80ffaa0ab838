"""The benchmark's ranges, and its warning on a machine that is busy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from selective.bench import as_json, table
from selective.bench.measure import Measurement, Result
from selective.bench.promised import promised_bytes
from selective.bench.spread import why_unreliable


def measured(name: str, seconds: list[float], fused: list[float], versus: float) -> Measurement:
    promise = promised_bytes(dtype=torch.float32)
    return Measurement(name, promise, 1000, 1e9, seconds=seconds, fused_seconds=fused, versus_fused=versus)


def result(*measurements: Measurement) -> Result:
    return Result("tiny", "cpu", torch.float32, 1, 1000, 5, 1e9, list(measurements))


QUIET = measured("torch fused", [0.010, 0.0101, 0.0102, 0.0103, 0.0104], [0.0101] * 5, 1.01)
STEADY = measured("MGUP", [0.020, 0.0201, 0.0202, 0.0203, 0.0204], [0.010] * 5, 2.02)
# ratios 2, 2.5, 3, 4, 6: the percentiles are 2.4 and 4.4, the median is 3
BUSY = measured("Grams", [0.020, 0.040, 0.030, 0.060, 0.025], [0.010] * 5, 3.0)


def test_a_range_stands_behind_each_figure() -> None:
    head, line = table(result(STEADY)).splitlines()[:2]
    assert head.split() == ["optimizer", "ms", "(range)", "×", "fused", "(its", "range)", *head.split()[7:]]
    assert line.split()[:5] == ["MGUP", "20.20", "20.08–20.32", "2.020", "2.01–2.03"]


def test_figures_of_a_quiet_machine_have_no_warning() -> None:
    assert why_unreliable(result(QUIET, STEADY)) is None
    assert why_unreliable(result(QUIET, STEADY, BUSY)) is None  # one of three: its range says enough
    assert (
        "warning" not in table(result(QUIET, STEADY)) and as_json([result(STEADY)])["results"][0]["unreliable"] is None
    )


@pytest.mark.parametrize(
    "busy,words",
    [
        ([BUSY, replace(BUSY, name="Magma")], "typically varies by 67% between the middle rounds"),
        ([replace(QUIET, versus_fused=1.36), STEADY], "torch's fused step took 1.36 × the time of itself"),
        ([replace(QUIET, versus_fused=0.7)], "torch's fused step took 0.70 × the time of itself"),
    ],
)
def test_figures_of_a_busy_machine_have_one(busy: list[Measurement], words: str) -> None:
    last = table(result(*busy)).splitlines()[-1]
    assert (
        last.startswith("warning: these figures mean little: ")
        and words in last
        and "stop it and measure again" in last
    )
    assert as_json([result(*busy)])["results"][0]["unreliable"] == last


def test_too_few_rounds_and_no_time_say_nothing() -> None:
    few = replace(BUSY, seconds=BUSY.seconds[:2], fused_seconds=BUSY.fused_seconds[:2])
    failed = replace(BUSY, refused="it failed", outcome="failed", seconds=[], fused_seconds=[])
    assert why_unreliable(result(few, failed)) is None and why_unreliable(result()) is None
