"""docs/evidence.md and its picture say what the records give; a record that says otherwise is noticed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from evidence.earlier import of_gain
from evidence.page import filled, marks, missing, rows_with_runs
from evidence.picture import draw
from evidence.plan import LONGER
from evidence.runs import Record, Results
from evidence.setups import POLICIES
from evidence.table import NOT_RUN, TABLES, said

from selective.compare.intervals import t_interval
from selective.compare.race import final, race
from selective.compare.summary import paired

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "evidence.md").read_text()
MEASUREMENTS = DOCS / "measurements"
AGAIN = "run.py with --page docs/evidence.md --picture docs/pictures/evidence.svg makes it"
FILES = ("evidence", "gain", "gain-times", "2026-11-29-demo.json")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    for name in FILES:
        copy = shutil.copytree if (MEASUREMENTS / name).is_dir() else shutil.copy
        copy(MEASUREMENTS / name, tmp_path / name)
    return tmp_path


def change(file: Path) -> None:
    """Make a run's final loss a tenth lower."""
    record = json.loads(file.read_text())
    record["validation"]["loss"][-1] -= 0.1
    file.write_text(json.dumps(record))


def claims(measurements: Path) -> set[str]:
    """The means with their intervals that the page's sentences have."""
    evidence = Results.read(measurements / "evidence")
    gain, times = of_gain(measurements / "gain"), of_gain(measurements / "gain-times")

    def runs(results: Results, task: str, setup: str, lr: float) -> dict[int, Record]:
        mine = results.by_seed(task, setup, (lr, None))
        assert mine.keys() == {0, 1, 2}, setup
        return mine

    adamw, soap, cautious = (
        runs(gain, "gain", setup, lr)
        for setup, lr in (("AdamW", 1.5e-3), ("Soap squared", 6e-3), ("Cautious in Soap squared", 6e-3))
    )
    base, timed = runs(times, "gain-times", "AdamW", 1.5e-3), runs(times, "gain-times", "Cautious in Soap tf32", 6e-3)
    tuned = runs(evidence, "python-34m", "AdamW", 3e-3)
    alpha = runs(evidence, "python-34m", "AlphaConsistency on AdamW", 3e-3)
    alpha_control = runs(evidence, "python-34m", "random like AlphaConsistency on AdamW", 3e-3)
    lion, lion_alpha, lion_cautious, lion_alpha_control, lion_cautious_control = (
        runs(evidence, "python-34m", setup, 3e-4)
        for setup in (
            "Lion", "AlphaConsistency on Lion", "Cautious on Lion",
            "random like AlphaConsistency on Lion", "random like Cautious on Lion",
        )
    )  # fmt: skip
    longer = evidence.by_seed("python-34m", "AdamW", (3e-3, None), LONGER)
    lion_longer = evidence.by_seed("python-34m", "Lion", (3e-4, None), LONGER)
    pairs = [(timed[seed], base[seed]) for seed in base]
    ratios = [race(pairs, axis).ratio for axis in ("step", "seconds")]
    ratios += [
        race([(mine[seed], theirs[seed]) for seed in theirs], "step").ratio
        for mine, theirs in ((alpha, tuned), (lion_alpha, lion))
    ]
    differences = [paired(mine, theirs) for mine, theirs in (
        (alpha, tuned), (longer, tuned), (soap, adamw), (cautious, adamw), (cautious, soap),
        (alpha, alpha_control), (alpha_control, tuned), (lion_alpha, lion), (lion_cautious, lion),
        (lion_cautious, lion_cautious_control), (lion_alpha_control, lion), (lion_longer, lion),
    )]  # fmt: skip
    return {
        said(t_interval([final(run) for run in adamw.values()])),
        *(said(ratio, 2) for ratio in ratios if ratio is not None),
        *(said(difference, sign="+") for difference in differences if difference is not None),
    }


def sentences(page: str) -> str:
    """The page's sentences on its records, without the tables that are made of them and without the demo."""
    first = page.partition("## Should you use this")[2].partition("## Does selection help")[0]
    rest = page.partition("## With 34M parameters")[2].partition("## Not run yet")[0]
    return first + re.sub(r"<!-- evidence: [^>]+ -->\n\n(\|.*\n)*", "", rest)


def test_the_tables_are_what_the_records_give(copied: Path) -> None:
    assert filled(PAGE, Results.read(MEASUREMENTS / "evidence")) == PAGE, AGAIN
    assert len(marks(PAGE)) > 1
    assert set(marks(PAGE)) <= {*TABLES, NOT_RUN}
    change(copied / "evidence" / "python-34m" / "AdamW-lr0.003-seed1.json")
    assert filled(PAGE, Results.read(copied / "evidence")) != PAGE


def unsaid(page: str, results: Results) -> list[str]:
    """The setups of all tables that the page neither has in a row nor names as not run."""
    named = {}
    for line in page.partition(f"<!-- evidence: {NOT_RUN} -->")[2].splitlines():
        name, _, labels = line.strip("| ").partition(" | ")
        named.setdefault(name, labels.split("; "))
    found = []
    for name in (name for name in TABLES if not name.endswith(" rates")):
        absent = missing(name, results)
        found += [f"{name}: {label}" for label in absent if label not in named.get(name, [])]
        run = rows_with_runs(name, results)[2:]
        if not all(line in page for line in run):
            found.append(f"{name} has no mark")
    return found


def test_every_setup_has_a_row_or_is_said_to_be_not_run() -> None:
    results = Results.read(MEASUREMENTS / "evidence")
    assert unsaid(PAGE, results) == []
    without = PAGE.replace("| english-110m |", "| english |")
    assert unsaid(without, results) == ["english-110m: AdamW", "english-110m: Muon"]
    more = Results([*results.records, {**results.records[0], "setup": "Muon"}])
    assert "python-34m Muon has no mark" in unsaid(PAGE, more)


def test_the_sentences_have_the_figures_of_the_records(copied: Path) -> None:
    stated = set(re.findall(r"[+−]?\d+\.\d+ ± \d+\.\d+", sentences(PAGE)))
    assert stated == claims(MEASUREMENTS)
    change(copied / "gain-times" / "AdamW-lr0.0015-seed1.json")
    assert stated != claims(copied)


def test_which_masks_gain_as_the_page_says() -> None:
    text = " ".join(PAGE.split())
    assert "`AlphaConsistency()` gains over a tuned AdamW" in text
    assert "`Cautious()` and both settings of MGUP gain nothing that three seeds show" in text
    rows = {base: rows_of(base) for base in ("AdamW", "Lion")}
    for base in rows:
        assert all(rows[base][f"{name} on {base}"][2] == "3" for name in POLICIES)
    assert better(rows["AdamW"], "AdamW", column=4) == ["AlphaConsistency"]
    assert "three seeds show that of no mask" in text
    assert not any(better(rows[base], base, column=5) for base in rows)
    assert "Masks gain more on it: `AlphaConsistency()`" in text
    assert better(rows["Lion"], "Lion", column=4) == ["Cautious", "AlphaConsistency"]
    assert "which just includes 0" in text
    mean, half = interval(rows["Lion"]["Cautious on Lion"][5])
    assert -0.01 < mean + half <= 0.01 and mean + half > 0
    assert "The control of `AlphaConsistency()` gained" in text
    assert sum(interval(rows["Lion"]["random like AlphaConsistency on Lion"][4])) < 0


def rows_of(base: str) -> dict[str, list[str]]:
    """The cells of a base's table, by setup."""
    lines = TABLES[f"python-34m {base}"](Results.read(MEASUREMENTS / "evidence"))
    return {line[2:].partition(" | ")[0]: line.split(" | ") for line in lines}


def interval(cell: str) -> tuple[float, float]:
    """A mean and half of its interval."""
    mean, half = (float(number.replace("−", "-")) for number in cell.split(" ± "))
    return mean, half


def better(rows: dict[str, list[str]], base: str, column: int) -> list[str]:
    """The masks whose interval in this column lies below 0."""
    return [name for name in POLICIES if sum(interval(rows[f"{name} on {base}"][column])) < 0]


def test_the_picture_is_of_the_files(copied: Path) -> None:
    picture = (DOCS / "pictures" / "evidence.svg").read_text()
    assert draw(MEASUREMENTS) == picture, AGAIN
    change(copied / "gain" / "Soap-squared-lr0.006-seed2.json")
    assert draw(copied) != picture
