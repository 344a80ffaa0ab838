"""The benchmark: refuses what computes something else, and reports what it has measured. Asserts no time."""

from __future__ import annotations

import pytest
import torch

from selective import Cautious, SelectiveUpdate
from selective.bench import (
    SHAPES,
    Contender,
    Mismatch,
    as_json,
    heading,
    peer_contenders,
    run,
    standard_contenders,
    table,
    torch_contenders,
)
from selective.bench.check import check
from selective.bench.contenders import control_contenders
from selective.kernels.cpu import apply as applying

LOW = [torch.bfloat16, torch.float16]
VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])


def adamw(params, **more):
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1, **more)


@pytest.fixture(autouse=True)
def quick_copy(monkeypatch):
    monkeypatch.setattr("selective.bench.clock.COPY_ELEMENTS", {"cpu": 1000, "cuda": 1000})


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", [(30, 7), (11,), ()])


@pytest.mark.parametrize("contender", [*standard_contenders(), *control_contenders()], ids=lambda c: c.name)
def test_every_contender_matches_its_reference(contender):
    check(contender)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", ["torch foreach", "torch fused", "CautiousMGUP", "MGUP", "AlphaConsistency"])
def test_in_low_precision_too(name, dtype):
    if name in ("torch foreach", "torch fused") and dtype == torch.float16 and VERSION < (2, 12):
        pytest.skip("torch adds an eps to float16 that is 0 there, and divides by it: seen in 2.11 on a CPU")
    (contender,) = [c for c in standard_contenders(dtype=dtype) if c.name == name]
    check(contender, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("name", [c.name for c in standard_contenders("cuda")])
def test_every_contender_matches_its_reference_on_a_gpu(name, dtype):
    (contender,) = [c for c in standard_contenders("cuda", dtype) if c.name == name]
    check(contender, "cuda", dtype)


def test_another_step_gets_no_time(tiny):
    wrong = Contender("Adam", lambda p: torch.optim.Adam(p, lr=1e-3), make_reference=adamw)
    result = run("tiny", [wrong], rounds=1)
    (measured,) = result.measurements
    assert measured.seconds == []
    assert measured.outcome == "mismatch"
    assert "of a parameter of shape" in (measured.refused or "")
    assert "no time (mismatch): Adam:" in table(result)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_a_broken_kernel_gets_no_time(monkeypatch, dtype):
    real = applying.Applier._write

    def slightly_off(self, start, end, *tensors):
        real(self, start, end, *tensors)
        self.flat.param[start:end] *= 1 + (1e-4 if dtype == torch.float32 else 2e-2)

    monkeypatch.setattr(applying.Applier, "_write", slightly_off)
    with pytest.raises(Mismatch, match="a time would be that of another step"):
        check(Contender("ours", lambda p: SelectiveUpdate(adamw(p), policy=Cautious())), dtype=dtype)


@pytest.mark.parametrize(
    ("agrees", "make", "says"),
    [
        ("near", lambda p: torch.optim.AdamW(p, lr=1.1e-3, weight_decay=0.1), "differ from the reference by"),
        ("own", lambda p: torch.optim.SGD(p, lr=0.0), "no element has moved"),
        ("own", lambda p: torch.optim.SGD(p, lr=float("inf")), "are not finite"),
    ],
)
def test_a_peer_that_does_something_else_gets_no_time(agrees, make, says):
    with pytest.raises(Mismatch, match=says):
        check(Contender("peer", make, adamw if agrees == "near" else None, agrees))


def test_gradients_that_a_step_clears_are_set_again(tiny):
    found = []

    class Consumes(torch.optim.AdamW):
        def step(self, closure=None):
            found.append(all(p.grad is not None for group in self.param_groups for p in group["params"]))
            super().step()
            self.zero_grad()

    consumes = Contender("consumes", lambda p: Consumes(p, lr=1e-3, weight_decay=0.1), adamw, "near")
    after = Contender("after", adamw, adamw)
    measured = run("tiny", [consumes, after], rounds=3).measurements
    assert [m.outcome for m in measured] == ["timed", "timed"]
    assert found
    assert all(found)


def test_what_is_missing_fails_or_does_not_fit_is_a_row_with_its_reason(tiny):
    def fails(params):
        raise TypeError("no such option")

    def too_large(params):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. And more")

    def lacks_something(params):
        raise ModuleNotFoundError("No module named 'torchvision'")

    rows = [
        Contender("absent", fails, missing="absent is not installed"),
        Contender("fails", fails, adamw),
        Contender("too large", too_large, adamw),
        Contender("lacks", lacks_something, agrees="own"),
        Contender("good", adamw, adamw),
    ]
    result = run("tiny", rows, rounds=2)
    outcomes = ["missing", "failed", "out of memory", "missing", "timed"]
    assert [m.outcome for m in result.measurements] == outcomes
    printed = table(result)
    assert "no time (missing): absent is not installed" in printed
    assert "no time (failed): TypeError: no such option" in printed
    assert "no time (out of memory): CUDA out of memory" in printed
    assert [m["outcome"] for m in as_json([result])["results"][0]["measurements"]] == outcomes


def test_own_optimizer_is_timed_beside_torch(tiny):
    mine = Contender("mine", lambda p: SelectiveUpdate(adamw(p), policy=Cautious()), policy=Cautious())
    result = run("tiny", [*torch_contenders(), mine], rounds=3, warm_up=1)
    measured = result.measurements
    assert [len(m.seconds) for m in measured] == [3, 3, 3, 3]
    assert measured[0].versus_foreach == 1
    assert all(m.versus_foreach and m.versus_fused for m in measured)
    assert "28 (36)" in table(result)
    assert heading(result).startswith("tiny: 0.0 M parameters in 3 tensors, float32, 3 rounds")


@pytest.mark.parametrize("name", ["optimi AdamW", "pytorch_optimizer LaProp", "pytorch_optimizer LaProp, cautious"])
def test_installed_peers_are_what_they_are_taken_for(name):
    (peer,) = [c for c in peer_contenders() if c.name == name]
    if peer.missing:
        pytest.skip(peer.missing)
    check(peer)


@pytest.mark.gpu
def test_a_gpu_tells_memory_launches_and_host_time(tiny):
    result = run("tiny", standard_contenders("cuda")[:5], device="cuda", rounds=2)
    assert [m.refused for m in result.measurements] == [None] * 5
    for m in result.measurements:
        assert m.extra_bytes is not None
        assert m.kept_bytes is not None
        assert m.host_seconds is not None
        assert m.launches is None or m.launches["kernels"] > 0
    assert "host ms" in table(result)


def test_a_set_of_shapes_that_is_not_there():
    with pytest.raises(ValueError, match="shapes is 'huge', must be one of"):
        run("huge")
