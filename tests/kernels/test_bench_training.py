"""`selective bench --training`: rows are checked before they are timed, and what it writes follows from that.

Asserts no time.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from selective import Cautious, Dense, Eigenbasis, param_groups_for
from selective.bench import Mismatch
from selective.bench.__main__ import main
from selective.bench.clock import CudaClock, HostClock, device_seconds
from selective.bench.contenders import Contender, NotPossible, adamw, wrapped
from selective.bench.measure import outcome_of
from selective.bench.shapes import MODELS
from selective.bench.training import measure, proofs, proofs_child
from selective.bench.training.facts import state_bytes
from selective.bench.training.groups import divided, groups_of
from selective.bench.training.measure import TrainingRig
from selective.bench.training.profile import profile_text
from selective.bench.training.proofs import prove_apart, prove_here
from selective.bench.training.prove import prove
from selective.bench.training.records import RowMeasurement, TrainingResult
from selective.bench.training.report import training_heading, training_json, training_table
from selective.bench.training.rows import FUSED, Row, training_rows
from selective.bench.training.steps import AlternatingGradients, host_seconds, in_a_row, wall_seconds
from selective.bench.workload import Stepping, Workload

TINY = [
    ("embeddings", (40, 8)), ("matrices", (8, 8)), ("matrices", (16, 8)), ("columns:3", (8, 24)),
    ("conv", (4, 2, 3, 3)), ("vectors", (8,)), ("head", (40, 8)),
]  # fmt: skip
ROWS = {row.name: row for row in training_rows("cpu")}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A small model, and few steps; the profiler of memory runs in one test alone."""
    monkeypatch.setitem(MODELS, "tiny", TINY)
    monkeypatch.setattr("selective.bench.training.steps.IN_A_ROW", (2,))
    monkeypatch.setattr(HostClock, "extra_bytes", lambda self, stepping, steps=1: 0)


EXTRA_BYTES = HostClock.extra_bytes


def rig(**options: Any) -> TrainingRig:
    """A rig that takes every row for right, unless it is given a proof."""
    return TrainingRig("tiny", "cpu", **{"proof": lambda row: ("timed", None, None), "rounds": 2, **options})


class Model(nn.Module):
    """With a parameter of each kind, in the order of `TINY`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 8)
        self.q, self.up = nn.Linear(8, 8, bias=False), nn.Linear(8, 16, bias=False)
        self.c_attn = nn.Module()
        self.c_attn.weight = nn.Parameter(torch.zeros(8, 24))
        self.conv = nn.Conv2d(2, 4, 3, bias=False)
        self.norm = nn.RMSNorm(8)
        self.lm_head = nn.Linear(8, 40, bias=False)


def test_groups_are_those_that_a_user_has():
    model = Model()
    params = list(model.parameters())
    theirs = param_groups_for(model, weight_decay=0.1, parts={"c_attn": "columns:3"})
    of_user = [{**g, "params": [p for _, p in g["params"]]} for g in theirs]
    ours = groups_of(params, [kind for kind, _ in TINY])
    assert [{k: v for k, v in g.items() if k != "name"} for g in of_user] == ours
    on_matrices = groups_of(params, [kind for kind, _ in TINY], "matrices")
    assert [g.get("policy", "the wrapper's") for g in on_matrices] == ["the wrapper's"] * 3 + [None] * 3
    flat, others = divided(ours)
    assert [p.shape for g in flat for p in g["params"]] == [(8, 8), (16, 8), (8, 24)]
    assert sum(len(g["params"]) for g in flat + others) == len(params)


QUICK = (  # the others are of the same kinds, and are checked in the slow lane
    "torch fused", "torch foreach", "MGUP", "Cautious, on matrices", "control of MGUP, on matrices",
    "Soap(cholesky, tf32) + Cautious, refresh every 10", "Eigenbasis(), no refresh", "torch Muon, AdamW for the rest",
    "Muon, Dense, capture='fused'", "Muon, MGUP, capture='fused'", "Muon, MGUP, capture='scratch'",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ROWS]
)
def test_every_row_matches_its_reference(name):
    row = ROWS[name]
    if row.contender.missing:
        pytest.skip(row.contender.missing)
    outcome, refused, _ = prove_here(row, "cpu")
    assert outcome == "timed", refused


def test_a_model_without_matrices_has_no_muon():
    row = ROWS["torch Muon, AdamW for the rest"]
    groups = groups_of([nn.Parameter(torch.zeros(3))], ["vectors"])
    with pytest.raises(NotPossible, match="this model has none inside") as refused:
        row.contender.make_optimizer(groups)
    assert outcome_of(refused.value, row.contender) == ("not possible", str(refused.value))


SPACE = Eigenbasis(stagger=False)


def rotated(policy: Any = None, **changed: Any) -> Row:
    """A row whose optimizer is in another space, or has another policy, than the row says."""
    contender = wrapped("rotated", policy or Dense(), adamw(), preconditioner=Eigenbasis(stagger=False, **changed))
    return Row(contender, policy=Dense(), space=SPACE)


def test_a_rotated_row_that_is_right_is_let_through():
    prove(rotated(), "cpu")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (rotated(carry="keep"), "moment is .* of its norm away from the transcription of a parameter of shape"),
        (rotated(carry="rotate"), "the second moment is"),
        (rotated(Cautious()), "rotated elements have another update"),
        (rotated(start_step=100), "the basis is still the identity"),
        (rotated(sides="one"), "the basis is missing"),
        (replace(rotated(), space=Eigenbasis(skip_first_step=True)), "in a step that stands still"),
    ],
    ids=["not carried", "permuted", "masked", "no basis", "one side", "first step"],
)
def test_a_rotated_row_that_does_something_else_gets_no_time(row, says):
    with pytest.raises(Mismatch, match=says):
        prove(row, "cpu")


def test_a_rotation_the_wrong_way_round_gets_no_time(monkeypatch):
    right = Eigenbasis._project
    monkeypatch.setattr(
        Eigenbasis, "_project", lambda self, states, xs, *, into: right(self, states, xs, into=not into)
    )
    with pytest.raises(Mismatch, match="moment is"):
        prove(rotated(), "cpu")


def test_rows_are_measured_in_turns_and_the_wrong_ones_say_why(monkeypatch):
    monkeypatch.setattr(HostClock, "extra_bytes", EXTRA_BYTES)
    wrong = Row(Contender("wrong", lambda g: torch.optim.Adam(g, lr=1e-3), adamw()))
    absent = Row(Contender("absent", adamw(), missing="absent is not installed"))

    def breaks(groups: Any) -> Any:
        raise ValueError("it has no such option\nand more")

    failing = Row(Contender("failing", breaks, agrees="own"))
    saved: list[int] = []
    told: list[Any] = []
    rows = [wrong, ROWS["MGUP"], failing, absent, ROWS["Soap(qr, float32), no refresh"], ROWS[FUSED]]
    proof = {wrong.name: prove_here(wrong, "cpu")}
    result = rig(
        proof=lambda row: proof.get(row.name, ("timed", None, None)),
        save=lambda r: saved.append(len(r.measurements)),
        tell=told.append,
    ).run(rows)
    outcomes = {m.name: m.outcome for m in result.measurements}
    assert list(outcomes) == [FUSED, "wrong", "MGUP", "failing", "absent", "Soap(qr, float32), no refresh"]
    assert list(outcomes.values()) == ["timed", "mismatch", "timed", "failed", "missing", "timed"]
    assert saved == [1, 2, 3, 4, 5, 6, 6]  # after each row, and after the second round
    assert told[-1] == "tiny: round 2 of 2, 2 rows"
    fused, mgup, soap = (result.named(name) for name in (FUSED, "MGUP", "Soap(qr, float32), no refresh"))
    assert fused and mgup and soap
    assert fused.versus_fused == 1
    assert len(mgup.seconds) == len(mgup.fused_seconds) == 2
    assert mgup.captures == ["fused"] and fused.captures == []
    elements = sum(p.numel() for p in Workload([shape for _, shape in TINY]).params)
    assert fused.state_bytes == 8 * elements + 4 * len(TINY)
    assert soap.state_bytes and soap.state_bytes > 8 * elements
    assert mgup.first_seconds and mgup.warm_up_seconds and mgup.peak_bytes
    printed = training_table(result)
    head = printed.splitlines()[0]
    assert [cell.strip() for cell in head.split("|")][1:4] == ["step", "wall ms", "× fused"]
    assert re.search(r"\| MGUP +\|.*\| +none \|", printed)  # of the device's columns
    assert "| no time (failed): ValueError: it has no such option |" in printed
    assert "no time (mismatch): wrong:" in printed
    (written,) = json.loads(json.dumps(training_json([result], "cpu")))["training"]
    assert [m["name"] for m in written["measurements"]] == list(outcomes)
    assert written["measurements"][2]["median_seconds"] == mgup.median


def test_a_row_that_fails_in_a_later_round_leaves_the_others():
    class Breaks(torch.optim.AdamW):
        steps = 0

        def step(self, closure: Any = None) -> None:
            self.steps += 1
            if self.steps > 4 + 2:  # warming up, and the first round
                raise RuntimeError("it has lost its state")
            super().step()

    breaks = Row(Contender("breaks", lambda groups: Breaks(groups, lr=1e-3), agrees="own"))
    first, broken, other = rig().run([ROWS[FUSED], breaks, ROWS["Cautious"]]).measurements
    assert (broken.outcome, broken.refused) == ("failed", "RuntimeError: it has lost its state")
    assert broken.seconds == [] and len(first.seconds) == 4 and len(other.seconds) == 2


def test_rows_that_do_not_fit_together_take_turns_in_parts(monkeypatch):
    monkeypatch.setattr(measure, "_most_bytes", lambda device: 0)
    told: list[Any] = []
    result = rig(tell=told.append).run([ROWS[FUSED], ROWS["MGUP"], ROWS["Cautious"]])
    assert [len(m.seconds) for m in result.measurements] == [5, 2, 2]  # fused's own, and one with each of the others
    assert [each for each in told if isinstance(each, str)] == ["tiny: round 2 of 2, 1 rows"] * 2


def test_every_row_on_a_gpu_may_record_a_graph(monkeypatch):
    """All rows are in one process, in place of many processes with a row each."""
    from selective.kernels.gpu.graphs import BUDGET

    seen = []

    def first_step(self, stepping, steps):
        seen.append(BUDGET.most_bytes)
        return 0.0

    timed = rig()
    limits = BUDGET.most_bytes
    timed.clock.graphs_of_all = CudaClock.graphs_of_all.__get__(timed.clock)
    monkeypatch.setattr(TrainingRig, "_warm_up", first_step)
    timed.run([ROWS[FUSED]])
    assert seen[0] == sys.maxsize
    assert BUDGET.most_bytes == limits


def test_after_a_deadline_nothing_is_begun():
    result = rig(deadline=time.monotonic() - 1).run([ROWS[FUSED], ROWS["MGUP"]])
    assert [m.outcome for m in result.measurements] == ["no time left"] * 2
    assert "no time (no time left): the time was up" in training_table(result)


def test_without_the_fused_step_there_is_nothing_to_compare_with():
    result = rig().run([ROWS["MGUP"]])
    assert result.measurements[0].outcome == "failed"
    assert "torch fused has no time" in str(result.measurements[0].refused)


def test_gradients_at_new_addresses():
    workload = Workload([(3, 4)])
    other = torch.ones(3, 4)
    stepping = AlternatingGradients(adamw()(workload.params), workload, [other])
    places = []
    for _ in range(4):
        stepping.prepare()
        grad = workload.params[0].grad
        assert grad is not None
        places.append(grad.data_ptr())
    assert places == [other.data_ptr(), workload.grads[0].data_ptr()] * 2
    assert rig(new_gradients=True).run([ROWS[FUSED]]).measurements[0].outcome == "timed"


def test_an_embeddings_untouched_rows_have_no_gradient():
    made = rig(untouched=0.5)
    places = [place for place, kind in enumerate(made.kinds) if kind == "embeddings"]
    assert places
    for place, grad in enumerate(made.workload.grads):
        rows = grad.flatten(1).any(1) if grad.dim() > 1 else grad != 0
        assert rows[: len(grad) // 2].any() == (place not in places)
        assert rows[len(grad) // 2 :].any()
    assert "50% of an embedding's rows have none" in training_heading(made.result)


def test_the_host_is_timed_with_an_idle_device(monkeypatch):
    """The device's clock waits before each step, and not after it; on a CPU there is no such time."""
    order: list[str] = []
    monkeypatch.setattr("torch.cuda.synchronize", lambda: order.append("wait"))
    workload = Workload([(3, 4)])
    stepping = Stepping(adamw()(workload.params), workload)
    monkeypatch.setattr(stepping, "step", lambda: order.append("step"))
    monkeypatch.setattr("selective.bench.training.steps.HOST_STEPS", 3)
    assert host_seconds(CudaClock(), stepping)
    assert order == ["wait", "step"] * 3 + ["wait"]
    assert host_seconds(HostClock(), stepping) is None
    order.clear()
    assert wall_seconds(CudaClock(), stepping, 4)
    assert order == ["wait", *["step"] * 4, "wait"]


def test_slow_steps_are_timed_in_shorter_rows(monkeypatch):
    monkeypatch.undo()
    assert [in_a_row(seconds) for seconds in (0.001, 0.03, 0.05, 0.1, 5.0)] == [40, 40, 20, 10, 10]


def test_seconds_of_the_device_are_kernels_copies_and_fills():
    kinds = ["kernel", "gpu_memcpy", "gpu_memset", "cuda_runtime", None]
    events = [{"cat": kind, "dur": 10.0**place} if kind else {} for place, kind in enumerate(kinds)]
    assert device_seconds({"traceEvents": events}) == pytest.approx(111e-6)


def test_state_counts_nested_tensors_once_each():
    p = nn.Parameter(torch.zeros(4))
    base = torch.optim.SGD([p], lr=0.1)
    base.state[p] = {"a": torch.zeros(4), "b": [torch.zeros(2), {"c": torch.zeros(1)}], "d": 3}
    assert state_bytes(base) == 4 * 7


def test_command_line(tmp_path, capsys):
    file = tmp_path / "out.json"
    options = ["--training", "--device", "cpu", "--no-peers"]
    options += ["--sets", "tiny", "--groups", "matrices", "--only", "control"]
    code = main([*options, "--rounds", "2", "--json", str(file)])
    out = capsys.readouterr()
    written = json.loads(file.read_text())
    names = [m["name"] for m in written["training"][0]["measurements"]]
    assert names == [
        "torch fused", "torch foreach", "control of Cautious, on matrices", "control of MGUP, on matrices",
    ]  # fmt: skip
    assert code == 0
    assert out.out.splitlines()[2].startswith("tiny: 0.0 M parameters in 7 tensors, float32, 2 rounds")
    assert "control of MGUP, on matrices: " in out.err
    assert {"date", "commit", "torch", "device"} < set(written)
    assert not list(tmp_path.glob("*.new"))


def test_a_time_limit_leaves_what_has_been_measured(tmp_path, monkeypatch, capsys):
    """SIGTERM in the third row."""
    file, real, begun = tmp_path / "out.json", TrainingRig._one, []

    def watched(self, row):
        begun.append(row.name)
        if len(begun) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, row)

    monkeypatch.setattr(TrainingRig, "_one", watched)
    options = ["--training", "--device", "cpu", "--sets", "tiny", "gpt2", "--only", "mgup", "--no-peers"]
    assert main([*options, "--json", str(file)]) == 130
    (result,) = json.loads(file.read_text())["training"]
    assert [m["name"] for m in result["measurements"]] == begun[:2] and result["interrupted"]
    assert "interrupted" in capsys.readouterr().out


def test_a_profile_says_where_the_time_goes(capsys):
    assert main(["--training", "--device", "cpu", "--sets", "tiny", "--profile", "mgup"]) == 0
    text = capsys.readouterr().out
    assert "MGUP, tiny: a step of 40" in text
    assert "selective/optimizer.py" in text and "kernels/cpu/selective_step.py" in text
    assert text.rstrip().endswith("by kernel\nnone")
    with pytest.raises(SystemExit):
        main(["--training", "--device", "cpu", "--sets", "tiny", "--profile", "nothing"])
    assert "no row is called so" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--shapes", "gpt2"], "leave --shapes, --dtype and --controls out"),
        (["--dtype", "bfloat16"], "leave --shapes, --dtype and --controls out"),
        (["--rotations"], "give one of them"),
        (["--sets", "huge"], "invalid choice: 'huge'"),
        (["--untouched", "1.5"], "--untouched: invalid share value: '1.5'"),
        (["--untouched", "nan"], "--untouched: invalid share value: 'nan'"),
        (["--only", "no such name"], "no name has it"),
    ],
)
def test_wrong_options_are_refused(capsys, more, says):
    with pytest.raises(SystemExit):
        main(["--training", "--device", "cpu", *more])
    assert says in capsys.readouterr().err


def test_what_a_process_says_of_a_row():
    said = proofs_child.proof(ROWS["Cautious, on matrices"], "cpu", "tiny")
    assert (said["outcome"], said["refused"]) == ("timed", None) and said["seconds"] > 0
    refused = proofs_child.proof(rotated(carry="keep"), "cpu", "tiny")
    assert refused["outcome"] == "mismatch" and refused["seconds"] is None


def test_a_process_that_breaks_is_replaced_and_no_other_row_is_blamed(monkeypatch):
    """The process is a stand-in, which costs no import of torch."""
    script = (
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    bad = line.strip() == 'bad'\n"
        "    if line.strip() == 'dies': sys.exit('died')\n"
        "    said = {'outcome': 'failed' if bad else 'timed', 'refused': 'CUDA error: lost' if bad else None}\n"
        "    print(json.dumps({**said, 'seconds': 0.5, 'ends': bad}), flush=True)\n"
        "    if bad: sys.exit(3)\n"
        "    if line.strip() == 'ends later': sys.exit(4)\n"
    )
    monkeypatch.setattr(proofs, "command_of", lambda *_: [sys.executable, "-c", script])
    names = ["a", "bad", "ends later", "b", "dies", "c"]
    rows = [replace(ROWS["MGUP"], contender=replace(ROWS["MGUP"].contender, name=name)) for name in names]
    right = ("timed", None, 0.5)
    assert prove_apart(rows, "cpu", "tiny", 1) == {
        "a": right, "bad": ("failed", "CUDA error: lost", 0.5), "ends later": right, "b": right,
        "dies": ("failed", "the process that checked it ended with code 1: died", None), "c": right,
    }  # fmt: skip


@pytest.mark.slow
def test_processes_check_rows_and_one_that_ends_is_replaced():
    unknown = replace(ROWS["MGUP"], contender=replace(ROWS["MGUP"].contender, name="unknown"))
    absent = replace(ROWS["MGUP"], contender=replace(ROWS["MGUP"].contender, name="absent", missing="not here"))
    told: list[str] = []
    proofs = prove_apart([unknown, absent, ROWS[FUSED]], "cpu", "transformer-30m", 1, tell=told.append)
    assert set(proofs) == {"unknown", FUSED}
    outcome, refused, _ = proofs["unknown"]
    assert (outcome, refused) == ("failed", "the process that checked it ended with code 1: KeyError: 'unknown'")
    outcome, refused, seconds = proofs[FUSED]
    assert (outcome, refused) == ("timed", None)
    assert seconds and seconds > 0
    assert told == ["checked unknown: failed", "checked torch fused"]


def test_checks_that_do_not_end_in_time_are_given_up():
    begun = time.monotonic()
    assert prove_apart([ROWS[FUSED]], "cpu", "transformer-30m", 1, deadline=begun) == {}


def test_the_table_of_a_gpu():
    """Of made-up numbers."""
    fused = RowMeasurement(
        FUSED, seconds=[0.001] * 2, fused_seconds=[0.001] * 2, host=[0.0005, 0.0004], fused_host=[0.0005, 0.0004],
        steps_in_a_row=40,
    )  # fmt: skip
    mine = replace(
        fused, name="MGUP", seconds=[0.002, 0.003], host=[0.00075, 0.0008], host_with_statistics=0.001,
        device_seconds=0.00025, launches={"kernels": 9.0, "copies": 1.0, "fills": 0.0}, peak_bytes=3 * 2**20,
        first_seconds=0.8, warm_up_seconds=0.02, cold_seconds=9.0, captures=["fused", "dense"],
    )  # fmt: skip
    table = training_table(TrainingResult("tiny", "cuda", 7, 1000, 2, measurements=[fused, mine]))
    cells = [cell.strip() for cell in table.splitlines()[3].split("|")][1:-1]
    assert cells == [
        "MGUP", "2.50", "2.50", "0.78", "1.75", "1.00", "0.250", "9 + 1", "3", "800 + 20", "9000", "fused dense",
    ]  # fmt: skip
    assert "a step of 40 in a row" in table


def test_a_row_on_a_pretended_gpu(monkeypatch):
    """The device's answers are faked; what is made of them is not."""
    held = iter([1000, 1700])
    events = [{"cat": kind, "dur": 40.0} for kind in ("kernel", "kernel", "gpu_memcpy", "cuda_runtime")]
    for name, fake in {
        "synchronize": lambda: None, "empty_cache": lambda: None, "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 2000, "max_memory_allocated": lambda: 2050,
    }.items():  # fmt: skip
        monkeypatch.setattr(f"torch.cuda.{name}", fake)
    taken: list[int] = []
    monkeypatch.setattr(CudaClock, "_profiled", lambda self, s, steps: taken.append(steps) or {"traceEvents": events})
    monkeypatch.setattr(CudaClock, "held_bytes", lambda self: next(held, 0))
    monkeypatch.setattr(measure, "clock_of", lambda device: CudaClock())
    monkeypatch.setattr(measure, "state_bytes", lambda optimizer: 600)
    fused, soap = rig().run([ROWS[FUSED], ROWS["Soap(cholesky, tf32) + Cautious, refresh every 10"]]).measurements
    assert taken == [1, 1, 10]  # twice at first, because the profiler itself has to start
    assert fused.launches == {"kernels": 2, "copies": 1, "fills": 0} and fused.device_seconds == pytest.approx(120e-6)
    assert soap.launches == {"kernels": 0.2, "copies": 0.1, "fills": 0} and soap.device_seconds == pytest.approx(12e-6)
    assert (fused.kept_bytes, fused.peak_bytes) == (100, 150)
    assert len(soap.host) == len(soap.fused_host) == 2 and fused.host_versus_fused == 1
    assert soap.host_with_statistics and fused.host_with_statistics is None


@pytest.mark.gpu
def test_a_gpu_tells_everything():
    rows = {row.name: row for row in training_rows("cuda")}
    names = [FUSED, "MGUP", "Soap(cholesky, tf32) + Cautious, refresh every 10", "torch Muon, AdamW for the rest"]
    rig = TrainingRig("tiny", "cuda", proof=lambda row: prove_here(row, "cuda"), rounds=2)
    result = rig.run([rows[name] for name in names])
    assert [(m.outcome, m.refused) for m in result.measurements] == [("timed", None)] * 4
    for m in result.measurements:
        assert m.host_seconds and m.kept_bytes is not None and m.peak_bytes
        assert m.launches is None or (m.launches["kernels"] >= 1 and m.device_seconds)
    assert all(m.host_with_statistics for m in result.measurements[1:3])
    assert "by kernel" in profile_text(rows["MGUP"], "tiny", "cuda")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, which other people's steps call ...
@pytest.mark.filterwarnings("ignore::UserWarning:torch")  # ... and its advice to them
@pytest.mark.parametrize("name", [row.name for row in training_rows("cuda")])
def test_every_row_matches_its_reference_on_a_gpu(name):
    row = next(row for row in training_rows("cuda") if row.name == name)
    outcome, refused, _ = ("timed", None, None) if row.contender.missing else prove_here(row, "cuda")
    assert outcome == "timed", refused
