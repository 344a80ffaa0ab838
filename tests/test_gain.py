"""scripts/gain.py on a model of a few thousand parameters: every run of the plan, sittings, the table."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = str(ROOT / "selective" / "policies")
TINY = ["--device", "cpu", "--text", SOURCES, "--steps", "5", "--batch", "2", "--micro-batch", "1", "--context", "8",
        "--layers", "1", "--width", "8", "--heads", "2", "--vocabulary", "270", "--evaluate-every", "1"]  # fmt: skip


@pytest.fixture
def gain(monkeypatch):
    """The script's parts under one name, and one rate for each setup."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))  # where Python finds them for who runs the script
    names = ("gain_plan", "gain_train", "gain_table", "gain", "evidence.claims")
    parts = [importlib.import_module(name) for name in names]
    monkeypatch.setattr(parts[0], "RATES", {name: rates[:1] for name, rates in parts[0].RATES.items()})
    yield SimpleNamespace(**{name: value for part in parts for name, value in vars(part).items()})
    for part in parts[:4]:
        del sys.modules[part.__name__]


def test_the_whole_plan_in_sittings(gain, tmp_path, capsys):
    arguments = ["--out", str(tmp_path), *TINY]
    assert gain.main([*arguments, "--seconds", "0"]) == 0  # the first run has begun by then, no second one does
    assert len(list(tmp_path.iterdir())) <= 1
    assert "out of time" in capsys.readouterr().out
    assert gain.main(arguments) == 0
    first = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert len(first) == 6 + 4 + 2 * 4 + 3 + 3 + 2 * 3 * 2
    runs = [json.loads(text) for text in first.values()]
    assert all(len(run["validation"]["loss"]) == run["steps"] + 1 for run in runs)
    assert sorted(run["steps"] for run in runs) == [2] * 9 + [3] * 6 + [5] * 21
    starts = {run["validation"]["loss"][0] for run in runs if run["seed"] == 0}
    assert len(starts) == 1  # everyone from the same model
    assert len({run["parameters_sha256"] for run in runs}) == len(runs)  # and nobody as another
    assert gain.main(arguments) == 0
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == first
    capsys.readouterr()
    assert gain.main(["--out", str(tmp_path), "--table"]) == 0
    printed = capsys.readouterr().out
    assert "| AdamW |" in printed
    assert "| Adafactor in AdaDiag++ |" in printed
    _, over_seeds = printed.split("| times fewer steps |")
    over_seeds, shorter = over_seeds.split("| against AdamW with all steps |")
    over_seeds, timed = over_seeds.split("| steps to AdamW's loss |")
    assert len(timed.splitlines()) > 6  # every run has recorded its times
    seeds = [line.split(" | ") for line in over_seeds.splitlines() if " | 3 | " in line]
    assert [line[0] for line in seeds][:1] == ["| AdamW"]
    assert len(seeds) == 4
    assert seeds[0][4] == "+0.0000 ± 0.0000"
    assert [sum(map(bool, line[5:7])) for line in seeds] == [0, 2, 0, 1]  # the mask's, the space's, the control's
    for steps, seeds, count in ((2, 3, 2), (3, 3, 2), (2, 1, 3)):
        assert len([line for line in shorter.splitlines() if f" | {steps} | {seeds} | " in line]) == count


@pytest.mark.parametrize("losses, wanted", [([10, float("inf")], "diverged"), ([10, 11], "(2 of 3)")])
def test_a_seed_that_diverged_does_not_hide_the_others(gain, tmp_path, losses, wanted):
    for seed in (0, 1, 2):
        for setup, curve in (("AdamW", losses if seed == 1 else [10, 2]), ("Soap", [10, 3, 1.9])):
            run = gain.Run(setup, 1e-3, seed)
            record = {"setup": setup, "lr": run.lr, "seed": seed, "part": 1, "steps": 2, "seconds": 1.0}
            record["validation"] = {"loss": curve, "step": list(range(len(curve)))}
            (tmp_path / run.file).write_text(json.dumps(record))
    printed = gain.table(tmp_path)
    _, over_seeds = printed.split("| times fewer steps |")
    assert [line for line in over_seeds.splitlines() if line.startswith("| Soap | 0.001 | 3 |") and wanted in line]


def test_times_to_a_loss(gain, tmp_path, monkeypatch):
    """Of made-up curves: steps and seconds at which AdamW's final loss is crossed, over AdamW's own."""
    for seed in (0, 1, 2):
        for setup, losses, seconds in (
            ("AdamW", [10, 6, 2], [0, 10 + seed, 20]),
            ("Cautious in Soap tf32", [10, 4, 0], [0, 18, 30]),  # crossed in the middle of the second half
            ("Soap", [10, 9, 8], [0, 15, 30]),
        ):
            run = gain.Run(setup, 1e-3, seed)
            record = {"setup": setup, "lr": run.lr, "seed": seed, "part": 1, "steps": 200, "seconds": 99.0}
            record["validation"] = {"loss": losses, "step": [0, 100, 200], "seconds": seconds}
            (tmp_path / run.file).write_text(json.dumps(record))
    _, times = gain.table(tmp_path).split("| by steps × ms |")
    lines = {line.split(" | ")[0]: line.split(" | ") for line in times.splitlines()[2:]}
    assert lines["| AdamW"][3:] == ["200", "100.0", "1.0000 ± 0.0000", "1.0000 ± 0.0000 (3 of 3) |"]
    # 150 steps; 18 + 12/2 seconds of 20; 150 × 0.15 s of 20 s
    assert lines["| Cautious in Soap tf32"][3:] == ["150", "150.0", "1.2000 ± 0.0000", "1.1250 ± 0.0000 (3 of 3) |"]
    assert lines["| Soap"][3] == "not reached"


def test_runs_whose_times_are_compared(gain, tmp_path, monkeypatch):
    wanted = list(gain.times())
    assert [(r.setup, r.lr, r.seed) for r in wanted[:2]] == [("AdamW", 1.5e-3, 0), ("Cautious in Soap tf32", 6e-3, 0)]
    assert len(wanted) == 2 * 3 + 2 * 2  # three seeds, and the neighbours of the best rates
    monkeypatch.setattr(sys.modules["gain"], "times", lambda: iter(wanted[:2]))
    assert gain.main(["--out", str(tmp_path), *TINY, "--times"]) == 0
    for record in gain.results(tmp_path):
        seconds = record["seconds_to_validation"]
        assert seconds[0] < seconds[-1] <= record["seconds"] and seconds == sorted(seconds)


def test_a_run_is_one_process_s_until_it_is_done(gain, tmp_path):
    run, other = gain.Run("AdamW", 1e-3), gain.Run("Soap", 1e-3)
    with gain.claimed(tmp_path, run) as mine:
        with gain.claimed(tmp_path, run) as theirs, gain.claimed(tmp_path, other) as free:
            assert (mine, theirs, free) == (True, False, True)
    with gain.claimed(tmp_path, run) as mine:
        assert mine
    (tmp_path / run.file).write_text("{}")  # another process has done it in the meantime
    with gain.claimed(tmp_path, run) as mine:
        assert not mine


def test_nobody_waits_beyond_the_deadline(gain, tmp_path):
    """... for what another process is at."""
    runs = list(gain.plan(list))
    with contextlib.ExitStack() as claims:
        for run in runs:
            claims.enter_context(gain.claimed(tmp_path, run))
        assert list(gain.next_run(tmp_path, 0.0, lambda: runs)) == []


def test_runs_that_depend_on_a_sweep_come_after_all_of_it(gain):
    swept = [gain.Run(setup, lr) for setup in ("AdamW", *gain.SPACES) for lr in gain.RATES[setup]]
    losses = dict(zip(swept, (3.0, 2.0, 1.0, 2.5), strict=True))

    def done(runs):
        return [{"setup": r.setup, "lr": r.lr, "seed": 0, "part": 1, "validation": {"loss": [losses[r]]}} for r in runs]

    early = list(gain.plan(lambda: done(swept[:-1])))
    late = list(gain.plan(lambda: done(swept)))
    masks = [gain.Run(f"{name} in AdaDiag++", swept[2].lr) for name in gain.MASKS]
    losses |= dict(zip(masks, (0.5, 0.4), strict=True))
    latest = list(gain.plan(lambda: done([*swept, *masks])))
    assert not [run for run in early if run.seed or (" in AdaDiag++" in run.setup and "Adafactor" not in run.setup)]
    assert [run for run in late if run not in early] == [
        *(gain.Run(f"{name} in AdaDiag++", swept[2].lr) for name in
          ("MGUP", "random like MGUP", "Cautious", "random like Cautious")),
    ]  # fmt: skip
    assert [run for run in latest if run not in late] == [
        run for seed in (1, 2) for run in
        (gain.Run("AdamW", swept[0].lr, seed), *(gain.Run(name, swept[2].lr, seed) for name in
         ("AdaDiag++", "Cautious in AdaDiag++", "random like Cautious in AdaDiag++")))
    ] + [
        gain.Run(name, swept[2].lr, seed, part) for part in (0.5, 0.6) for seed in (0, 1, 2)
        for name in ("AdaDiag++", "Cautious in AdaDiag++")
    ]  # fmt: skip


def test_the_runs_of_selective_decay(gain, tmp_path, monkeypatch):
    """Selective decay and its control, which both end elsewhere than AdamW."""
    wanted = list(gain.decays())
    assert len(wanted) == 3 * 3 + 2 * 2
    monkeypatch.setattr(sys.modules["gain"], "decays", lambda: iter(wanted[:3]))
    assert gain.main(["--out", str(tmp_path), *TINY, "--decays"]) == 0
    runs = {record["setup"]: record for record in gain.results(tmp_path)}
    assert list(runs) == ["AdamW", "AdamW with CautiousDecay", "random like AdamW with CautiousDecay"]
    assert len({record["parameters_sha256"] for record in runs.values()}) == 3
