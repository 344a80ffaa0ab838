"""The benchmark's parts: workload, clocks, command line and JSON."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from selective.bench import SHAPES, Contender, as_json, measure, peer_contenders, run
from selective.bench.__main__ import main
from selective.bench.check import PEERS_CHECKED
from selective.bench.clock import CudaClock, HostClock, copy_bandwidth, count_launches
from selective.bench.contenders import adamw
from selective.bench.environment import commit
from selective.bench.measure import Rig
from selective.bench.spread import percentile
from selective.bench.workload import Stepping, Workload


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", [(30, 7), (11,), ()])
    monkeypatch.setattr("selective.bench.clock.COPY_ELEMENTS", {"cpu": 1000, "cuda": 1000})


def test_a_workload_is_the_same_for_the_same_seed_and_its_gradients_change():
    a, b = (Workload([(30, 7), ()], unaligned=[(5,)], seed=3) for _ in range(2))
    assert all(torch.equal(p, q) and torch.equal(p.grad, q.grad) for p, q in zip(a.params, b.params, strict=True))
    assert [p.data_ptr() % 16 for p in a.params] == [0, 0, 4]
    start = [(p.detach().clone(), g.clone()) for p, g in zip(a.params, a.grads, strict=True)]
    places = [g.data_ptr() for g in a.grads]
    a.fresh_gradients()
    assert not torch.equal(a.grads[0], start[0][1])
    with torch.no_grad():
        a.params[0].zero_()
    a.refill()
    assert all(torch.equal(p, q) and torch.equal(p.grad, g) for p, (q, g) in zip(a.params, start, strict=True))
    assert [g.data_ptr() for g in a.grads] == places


def test_extra_bytes_sees_foreach_temporaries():
    workload = Workload([(1000, 100)])
    stepping = Stepping(adamw(foreach=True)(workload.params), workload)
    stepping.warm_up(1)
    assert 400_000 <= HostClock().extra_bytes(stepping) <= 3 * 400_000  # a temporary or two of the parameter's size


def test_launches_are_counted_without_the_annotations_around_them():
    kinds = ["kernel", "kernel", "gpu_memcpy", "gpu_memset", "gpu_user_annotation", "cuda_runtime", None]
    trace = {"traceEvents": [{"cat": kind} if kind else {} for kind in kinds]}
    assert count_launches(trace) == {"kernels": 2, "copies": 1, "fills": 1}
    assert count_launches({"traceEvents": []}) is None  # the profiler saw nothing


def test_the_clock_of_a_gpu_over_a_pretended_one(monkeypatch):
    # What it asks the device is faked; that it asks in the right order is not. Without a profiler there are no counts.
    now, held = iter(range(0, 1000, 6)), iter([100, 100, 130, 130, 130, 130])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(now)

        def synchronize(self):
            self.waited = True

        def elapsed_time(self, end):
            assert end.waited
            return float(end.at - self.at)

    for name, fake in {
        "Event": Event,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: next(held),
        "max_memory_allocated": lambda: 175,
    }.items():
        monkeypatch.setattr(f"torch.cuda.{name}", fake)
    clock, workload = CudaClock(), Workload([(30, 7)])
    rig = Rig(clock, workload, rounds=2, warm_up=1)
    assert (rig.baseline_bytes, rig.baseline_count) == (0, 10)  # a step of 6 ms
    stepping, kept = rig.warmed(Contender("AdamW", adamw()))
    assert (kept, clock.extra_bytes(stepping)) == (0, 45)
    assert clock.seconds(stepping, 3) == pytest.approx(0.002)
    assert clock.host_seconds(stepping) is not None
    if not torch.cuda.is_available():
        assert clock.launches(stepping) is None
    clock.settle()


def test_small_parts():
    assert [percentile([3.0, 1.0, 2.0], q) for q in (0, 20, 50, 100)] == [1.0, pytest.approx(1.4), 2.0, 3.0]
    assert copy_bandwidth("cpu", 1000) > 0


def test_a_commit_is_that_of_a_checkout_which_has_the_files(tmp_path):
    assert commit(tmp_path) is None
    assert commit(Path(sys.executable).parent) is None  # inside of a checkout or not, it is no part of one


def test_peers_that_are_not_installed_say_so(monkeypatch):
    monkeypatch.setattr("selective.bench.peers.find_spec", lambda name: None)
    assert {c.missing for c in peer_contenders()} == {
        f"{name} is not installed"
        for name in ("timm", "heavyball", "torch-optimi", "pytorch_optimizer", "bitsandbytes", "torchao")
    }
    assert all(len(shape) > 0 for shape in PEERS_CHECKED)


def test_json_has_what_it_takes_to_read_it_later():
    report = as_json([run("tiny", [Contender("AdamW", adamw(), adamw())], rounds=2)])
    assert set(report) == {
        "date", "commit", "python", "torch", "triton", "device", "gpu", "cpu", "threads", "results",
    }  # fmt: skip
    (result,) = report["results"]
    assert {"shapes", "dtype", "tensors", "parameters", "rounds", "copy_bytes_per_second", "floor_seconds"} < set(
        result
    )
    (one,) = result["measurements"]
    assert set(one["percentiles_seconds"]) == {"p20", "p50", "p80"}
    assert {"name", "outcome", "promised_bytes", "seconds", "fused_seconds", "versus_fused", "versus_floor",
            "bytes_per_second", "extra_bytes", "kept_bytes", "launches", "host_seconds"} < set(one)  # fmt: skip
    json.dumps(report)


def test_command_line(tmp_path, capsys):
    file = tmp_path / "out.json"
    options = ["--device", "cpu", "--shapes", "tiny", "--only", "mgup", "--rounds", "2", "--json", str(file)]
    assert main(options) == 0
    assert "MGUP (sampled) + statistics" in capsys.readouterr().out
    (result,) = json.loads(file.read_text())["results"]
    assert [m["name"] for m in result["measurements"]] == [
        "torch foreach",
        "torch fused",
        "MGUP",  # and not CautiousMGUP, which does not begin with it
        "MGUP (sampled)",
        "CautiousDecay, MGUP",
        "MGUP + statistics",
        "MGUP (sampled) + statistics",
        "MGUP, scratch around fused",
    ]


def test_a_time_limit_leaves_what_has_been_measured(tmp_path, monkeypatch, capsys):
    """SIGTERM in the fourth of six, and what was the handler before is it again."""
    file, measured, really = tmp_path / "out.json", [], measure._measure

    def watched(contender, *arguments):
        measured.append(contender.name)
        if len(measured) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return really(contender, *arguments)

    monkeypatch.setattr(measure, "_measure", watched)
    before = signal.getsignal(signal.SIGTERM)
    options = ["--device", "cpu", "--shapes", "tiny", "--only", "mgup", "--rounds", "1", "--json", str(file)]
    assert main(options) == 130
    assert "interrupted" in capsys.readouterr().out
    (result,) = json.loads(file.read_text())["results"]
    assert [m["name"] for m in result["measurements"]] == measured[:3] and len(measured) == 4
    assert result["interrupted"] is True
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_a_time_limit_while_results_are_written_waits(tmp_path, monkeypatch, capsys):
    """... and one before there are any is no traceback."""
    file = tmp_path / "out.json"
    options = ["--device", "cpu", "--shapes", "tiny", "--only", "mgup", "--rounds", "1", "--json", str(file)]

    def ended(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return "the table"

    with monkeypatch.context() as patch:
        patch.setattr("selective.bench.__main__.table", ended)
        assert main(options) == 130
    (result,) = json.loads(file.read_text())["results"]
    assert len(result["measurements"]) == 8 and not result["interrupted"]
    file.unlink()
    monkeypatch.setattr(measure, "copy_bandwidth", ended)
    assert main(options) == 130 and not file.exists()
    assert "interrupted" in capsys.readouterr().out


@pytest.mark.slow
def test_command_line_of_several_shapes_in_low_precision(tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "other", [(8,)])
    file = tmp_path / "out.json"
    options = ["--device", "cpu", "--dtype", "bfloat16", "--shapes", "tiny", "other", "--only", "Grams"]
    assert main([*options, "--rounds", "1", "--json", str(file)]) == 0
    results = json.loads(file.read_text())["results"]
    assert [(r["shapes"], r["dtype"]) for r in results] == [("tiny", "bfloat16"), ("other", "bfloat16")]
    assert results[0]["measurements"][0]["promised_bytes"] == {"floor": 14, "plain": 14}


def test_a_missing_peer_is_no_failure(monkeypatch, capsys):
    monkeypatch.setattr("selective.bench.peers.find_spec", lambda name: None)
    assert main(["--device", "cpu", "--shapes", "tiny", "--peers", "--only", "timm", "--rounds", "1"]) == 0
    assert "no time (missing): timm is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--rounds", "0"], "a whole number from 1 on is needed"),
        (["--threads", "-1"], "a whole number from 1 on is needed"),
        (["--only", "no such name"], "no name has it; there are torch foreach"),
        (["--json", "/nowhere/out.json"], "the folder /nowhere is not there"),
        (["--dtype", "float64"], "invalid choice: 'float64'"),
        (["--shapes", "huge"], "invalid choice: 'huge'"),
        (["--device", "cuda"], "torch sees no CUDA device"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_timed(monkeypatch, capsys, more, says):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as left:
        main(["--shapes", "tiny", *more])
    assert left.value.code == 2
    assert says in capsys.readouterr().err
