"""The figures in README.md are those of the measurement files, each computed again from the runs or timings in them.

`CLAIMS` pairs a part of a sentence with the figures that the files give for its groups. A number in `measured(...)`
that no claim covers is an error, so that none can be added without a file behind it.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
from demo_results import best_rows, less_time, summary_of
from PIL import Image

from selective import Soap
from selective.bench.shapes import MODELS
from selective.compare.config import ModelConfig
from selective.compare.intervals import Interval
from selective.compare.model import GPT
from selective.compare.race import race
from selective.compare.summary import paired

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MEASUREMENTS = ROOT / "docs" / "measurements"
DEMO, FRESH = "2026-11-30-demo.json", "2026-11-30-demo-fresh-seeds.json"
H200, CPU = "2026-11-29-h200-llama-1b-later.json", "2026-11-28-cpu-transformer-30m.json"
ROTATIONS = "2026-11-29-h200-rotations.json"
PEERS = ("2026-11-28-h200-gpt2-peers.json", "2026-11-28-h200-gpt2-peers-more.json")
FILES = (DEMO, FRESH, H200, CPU, ROTATIONS, *PEERS)
CAUTIOUS, SOAP = 1, 3  # the demo's contenders


def number(value: float | Interval | None, digits: int) -> str:
    assert value is not None
    if not isinstance(value, Interval):
        return f"{value:.{digits}f}"
    assert value.half is not None
    return f"{abs(value.mean):.{digits}f} ± {value.half:.{digits}f}"


Setup = tuple[str, float, float | None]  # its name, the rate of the inner matrices, and that of the rest


class Files:
    """The figures of the README, computed from a folder of measurements."""

    def __init__(self, folder: Path) -> None:
        self.read = {name: json.loads((folder / name).read_text()) for name in FILES}
        self.folder = folder

    def demo(self, name: str, contender: int) -> SimpleNamespace:
        """Of a contender at its best rate: its row, how many times less time it takes to AdamW's loss, its control."""
        summary = summary_of(self.read[name])
        control = next((one.against_control for one in summary.found if one.contender.index == contender), None)
        time = less_time(self.read[name], contender)
        return SimpleNamespace(row=best_rows(summary)[contender], less_time=time, control=control)

    def race(self, mine: Setup, base: Setup, axis: str) -> Interval:
        """The factor by which steps, or seconds, are fewer than the base's to its final loss, at three seeds."""
        first, second = self.runs(mine), self.runs(base)
        ratio = race([(first[seed], second[seed]) for seed in second], axis).ratio
        assert ratio is not None
        return ratio

    def difference(self, mine: Setup, theirs: Setup) -> Interval:
        """The difference of two setups' final losses at three seeds."""
        found = paired(self.runs(mine), self.runs(theirs))
        assert found is not None
        return found

    def runs(self, setup: Setup) -> dict[int, Any]:
        """The runs of a setup with 34M parameters, at its two rates, by seed."""
        name, lr, rest = setup
        results = importlib.import_module("evidence.runs").Results.read(self.folder / "evidence")
        mine = results.by_seed("python-34m", name, (lr, rest))
        assert mine.keys() == {0, 1, 2}
        return mine

    def step(self, file: str, row: str) -> float:
        """A benchmark's median ratio to torch's fused step."""
        rows = {m["name"]: m for m in self.read[file]["results"][0]["measurements"]}
        return median(a / b for a, b in zip(rows[row]["seconds"], rows[row]["fused_seconds"], strict=True))

    def peer(self, row: str) -> list[str]:
        """The least and the most of both runs beside other people's optimizers."""
        return [f"{ratio:.1f}" for ratio in sorted(self.step(file, row) for file in PEERS)]

    def rotation(self, line: str) -> dict[str, Any]:
        return next(one for one in self.read[ROTATIONS]["rotations"][0]["lines"] if one["name"] == line)


POLICIES = ("CautiousMGUP", "MGUP", "Cautious")
PM = r"(\d+\.\d+ ± \d+\.\d+)"
N = r"(\d+(?:\.\d+)?)"


def demo_model(files: Files) -> list[str]:
    model = GPT(ModelConfig(**files.read[DEMO]["config"]["model"]), seed=0)
    return [f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}"]


def demo_setting(files: Files) -> list[str]:
    config = files.read[DEMO]["config"]
    return [str(config["steps"]), str(len(config["seeds"]))]


def demo_gain(files: Files) -> list[str]:
    found = files.demo(DEMO, CAUTIOUS)
    return [number(found.row.speed, 2), number(found.less_time, 2)]


def demo_rotation(files: Files) -> list[str]:
    found = files.demo(DEMO, SOAP)
    low, high = found.less_time.mean - found.less_time.half, found.less_time.mean + found.less_time.half
    assert low < 1 < high, "README says that a rotation gains no time"
    return [number(found.row.speed, 2), number(found.less_time, 2)]


ADAMW: Setup = ("AdamW", 3e-3, None)
TWO_RATES: Setup = ("AdamW", 1.5e-3, 12e-3)
BEST: Setup = ("Cautious on AdamW in Soap, norm controlled", 3.6e-2, 6e-3)
BEST_CONTROL: Setup = ("random like Cautious on AdamW in Soap, norm controlled", 3.6e-2, 6e-3)
MUON: Setup = ("Muon", 4e-2, 4.8e-2)
OUR_MUON: Setup = ("Muon, by our kernels", 4e-2, 4.8e-2)
ALPHA: Setup = ("AlphaConsistency on AdamW", 3e-3, None)


def two_rates(files: Files) -> list[str]:
    gain = files.race(TWO_RATES, ADAMW, "step")
    assert gain.mean > files.race(ALPHA, ADAMW, "step").mean, "README says that it is more than any mask gives"
    return ["3", number(gain, 2)]


def at_34m(files: Files) -> list[str]:
    assert files.difference(BEST, OUR_MUON).sign == -1, "README says that it ends lower than Muon"
    assert files.difference(BEST, BEST_CONTROL).sign == 0, "README says that it is not shown to beat its control"
    return [number(files.race(BEST, TWO_RATES, axis), 2) for axis in ("step", "seconds")]


def muon(files: Files) -> list[str]:
    masked: tuple[Setup, ...] = (("Cautious on Muon", 4e-2, 4.8e-2), ("MGUP mild on Muon", 2e-2, 2.4e-2))
    assert all(files.difference(one, MUON).sign == 1 for one in masked), "README says that masks on Muon hurt"
    return [number(files.race(OUR_MUON, TWO_RATES, "seconds"), 2)]


def mask_alone(files: Files) -> list[str]:
    return [number(files.race(ALPHA, ADAMW, "step"), 2)]


def against(file: str) -> Callable[[Files], list[str]]:
    def both(files: Files) -> list[str]:
        found = files.demo(file, CAUTIOUS)
        assert found.row.difference.sign == found.control.sign == -1, "README says that both are below"
        return [number(found.row.difference, 3), number(found.control, 3)]

    return both


def rotated_step(files: Files) -> list[str]:
    one, dense = files.rotation("one-sided tf32"), files.rotation("dense")
    times = f"{one['seconds'] * 1e3:.0f}", f"{dense['seconds'] * 1e3:.1f}"
    return [*times, f"{one['facts']['bytes'] / 1e9:.1f}"]


def on_cpu(files: Files) -> list[str]:
    size = files.read[CPU]["results"][0]["parameters"] / 1e6
    return [str(files.read[CPU]["threads"]), f"{size:.0f}", *(f"{files.step(CPU, policy):.1f}" for policy in POLICIES)]


def soap_bytes(files: Files) -> list[str]:
    """Float32 bases and averages of both sides of the matrices of `llama-1b` that are no embedding or head."""
    matrices = [shape for _, shape in MODELS["llama-1b"] if len(shape) == 2 and max(shape) <= Soap().max_dim]
    return [f"{sum(2 * 4 * side**2 for shape in matrices for side in shape) / 1e9:.0f}"]


CLAIMS: dict[str, Callable[[Files], list[str]]] = {
    rf"a GPT of {N}M parameters": demo_model,
    rf"on a CPU, {N} steps, {N} seeds": demo_setting,
    rf"final loss in {PM} times fewer steps and {PM} times less time": demo_gain,
    rf"\*\*no time that the seeds show\*\*: {PM} times fewer steps and {PM} times less time": demo_rotation,
    rf"\({N} seeds\) a learning rate of its own for embeddings, head and vectors gives AdamW {PM} times": two_rates,
    rf"Muon without a mask takes \*\*{PM} times less time\*\* with our kernels": muon,
    rf"with `NormControl\(\)` ends lower still, and takes {PM} times fewer steps and {PM} times less time": at_34m,
    rf"only `AlphaConsistency\(\)` gains: it takes {PM} times fewer steps": mask_alone,
    rf"optimizer step of {N}B parameters": lambda files: [f"{files.read[H200]['results'][0]['parameters'] / 1e9:.1f}"],
    rf"takes {N} × torch's fused AdamW with `CautiousMGUP\(\)`, {N} × with `MGUP\(\)` and {N} × with `Cautious\(\)`": (
        lambda files: [f"{files.step(H200, policy):.2f}" for policy in POLICIES]
    ),
    rf"On {N} CPU cores and {N}M parameters these are {N} ×, {N} × and {N} ×": on_cpu,
    rf"`AdaDiag\(\)` takes {N} ms in TF32, and {N} ms without a rotation\. Its bases take {N} GB\.": rotated_step,
    rf"`Soap\(\)` keeps {N} GB there": soap_bytes,
    rf"`Cautious\(\)` ends {PM} nats a byte below AdamW and {PM} below its control": against(DEMO),
    rf"Fresh seeds agree: {PM} and {PM}": against(FRESH),
    rf"AdamW has its best of {N} learning rates": lambda files: [str(len(files.read[DEMO]["config"]["lr"]))],
    rf"timm's AdamW with `caution=True` takes {N} × torch's fused step, and HeavyBall's takes {N} ×": (
        lambda files: [f"{files.step(PEERS[0], row):.1f}" for row in ("timm AdamW, caution", "HeavyBall AdamW")]
    ),
    rf"`CautiousMGUP\(\)` takes {N} to {N} × and": lambda files: files.peer("CautiousMGUP"),
    rf"`MGUP\(\)` {N} to {N} ×": lambda files: files.peer("MGUP"),
}
# Numbers that are no measurement: of a setting, of statistics, a rough border, names.
PLAIN = (
    r"With 34M parameters",
    r"below about 1B parameters",
    r"All ± are 95 % intervals",
    r"H200",
    r"TF32",
    r"FSDP2",
    r"GPT-2",
)


def measured(text: str) -> str:
    """The parts that hold figures, in one line."""
    first = text.partition("\n- **What it gains.")[2].partition("\n## Install")[0]
    peers = text.partition("\n## Why not")[2].partition("\n## What it is not")[0].partition("\n")[2]
    assert first and peers, "the headings that this test looks for are not in README.md"
    return re.sub(r"\s+", " ", re.sub(r"\]\([^)]*\)", "]", f"{first} {peers}"))


def wrong(text: str, files: Files) -> list[str]:
    """Return what is said otherwise than the files have it, and numbers that no claim covers."""
    found, covered, line = [], set(), measured(text)
    for pattern, figures in CLAIMS.items():
        matches = list(re.finditer(pattern, line))
        if len(matches) != 1:
            found.append(f"{len(matches)} places say {pattern!r}")
            continue
        said, expected = list(matches[0].groups()), figures(files)
        covered.update(place for group in range(1, len(said) + 1) for place in range(*matches[0].span(group)))
        if said != expected:
            found.append(f"{pattern!r} is said of {said}, the files have {expected}")
    for pattern in PLAIN:
        covered.update(place for match in re.finditer(pattern, line) for place in range(*match.span()))
    bare = [match for match in re.finditer(r"\d+(?:\.\d+)?", line) if match.start() not in covered]
    return found + [
        f"no claim covers {match[0]!r} in ...{line[max(0, match.start() - 40) : match.end() + 20]}" for match in bare
    ]


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))  # where the package `evidence` is


def test_the_figures_are_those_of_the_files() -> None:
    assert wrong(README, Files(MEASUREMENTS)) == []


def tamper(content: Any) -> Any:
    """Runs with worse losses in a tenth of the time; timings twice as long, but not those that they are set to."""
    if isinstance(content, list):
        return [tamper(one) for one in content]
    if not isinstance(content, dict):
        return content
    changed = {key: tamper(value) for key, value in content.items()}
    if "parameters_sha256" in changed and changed.get("contender", 1) > 0:  # a run, not the baseline's of a comparison
        changed["validation"]["loss"] = [loss + 0.1 for loss in changed["validation"]["loss"]]
        changed["seconds"] /= 10  # the fastest run of its setup now
    if isinstance(changed.get("seconds"), list):
        changed["seconds"] = [2 * one for one in changed["seconds"]]
    elif "name" in changed and "seconds" in changed:
        changed["seconds"] *= 2
    return changed


RUNS = (
    "evidence/python-34m/AdamW-lr0.003-seed1.json",
    "evidence/python-34m/AdamW-lr0.0015-rest0.012-seed2.json",
    "evidence/python-34m/Cautious-on-AdamW-in-Soap--norm-controlled-lr0.036-rest0.006-seed0.json",
    "evidence/python-34m/AlphaConsistency-on-AdamW-lr0.003-seed0.json",
    "evidence/python-34m/Muon--by-our-kernels-lr0.04-rest0.048-seed0.json",
)


@pytest.mark.parametrize("name", [*FILES, *RUNS])
def test_a_file_that_says_otherwise_is_noticed(name: str, tmp_path: Path) -> None:
    shutil.copytree(MEASUREMENTS, tmp_path / "m")
    file = tmp_path / "m" / name
    file.write_text(json.dumps(tamper(json.loads(file.read_text()))))
    with pytest.raises(AssertionError):  # also where a claim has no figures any more: Soap() has to gain no time
        assert wrong(README, Files(tmp_path / "m")) == []


def test_a_figure_that_is_written_otherwise_or_has_no_file_is_noticed() -> None:
    files = Files(MEASUREMENTS)
    changed = README.replace("0.158 ± 0.021", "0.999 ± 0.021")
    assert [line for line in wrong(changed, files) if "0.999" in line]
    added = README.replace("All ± are", "It is 9.5 × better. All ± are")
    assert [line[:24] for line in wrong(added, files)] == ["no claim covers '9.5' in"]
    gone = README.replace("Fresh seeds agree", "Others agree")
    assert any(line.startswith("0 places say") for line in wrong(gone, files))


def test_the_picture_is_of_the_file() -> None:
    with Image.open(ROOT / "docs" / "pictures" / "demo.png") as picture:
        drawn_from = picture.info["results-sha256"]
    same = hashlib.sha256((MEASUREMENTS / DEMO).read_bytes()).hexdigest()
    assert drawn_from == same, "python docs/pictures/demo.py draws it again"


def test_the_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons = [line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)]
    lowest = next(line.partition(">=")[2] for line in project["dependencies"] if line.startswith("torch>="))
    assert f"Python {pythons[0]} to {pythons[-1]}, torch {lowest} to " in README
    assert project["requires-python"] == f">={pythons[0]}"


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150
