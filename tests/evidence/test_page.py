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
from evidence.runs import Record, Results, step_seconds
from evidence.setups import POLICIES
from evidence.table import NOT_RUN, TABLES, said

from selective.compare.race import race
from selective.compare.summary import paired

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "evidence.md").read_text()
MEASUREMENTS = DOCS / "measurements"
AGAIN = "run.py with --page docs/evidence.md --picture docs/pictures/evidence.svg makes it"
FILES = ("evidence", "gain", "2026-11-30-demo.json")


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


def runs(results: Results, task: str, setup: str, lr: float) -> dict[int, Record]:
    """The three runs of a setup at a rate, by seed."""
    mine = results.by_seed(task, setup, (lr, None))
    assert mine.keys() == {0, 1, 2}, setup
    return mine


def claims(measurements: Path) -> set[str]:
    """The means with their intervals that the page's sentences have."""
    evidence = Results.read(measurements / "evidence")
    soap, cautious = (
        runs(evidence, "python-34m", setup, 6e-3) for setup in ("AdamW in Soap", "Cautious on AdamW in Soap")
    )
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
    ratios = [
        race([(mine[seed], theirs[seed]) for seed in theirs], axis).ratio
        for mine, theirs, axis in (
            (alpha, tuned, "step"), (lion_alpha, lion, "step"), (cautious, soap, "step"),
            (soap, tuned, "step"), (soap, tuned, "seconds"), (cautious, tuned, "step"), (cautious, tuned, "seconds"),
        )
    ]  # fmt: skip
    differences = [paired(mine, theirs) for mine, theirs in (
        (alpha, tuned), (longer, tuned), (soap, tuned), (cautious, tuned), (cautious, soap), (soap, longer),
        (cautious, longer),
        (alpha, alpha_control), (alpha_control, tuned), (lion_alpha, lion), (lion_cautious, lion),
        (lion_cautious, lion_cautious_control), (lion_alpha_control, lion), (lion_longer, lion),
    )]  # fmt: skip
    return {
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
    more = Results([*results.records, {**results.records[0], "setup": "Magma on AdamW"}])
    assert "python-34m readings has no mark" in unsaid(PAGE, more)


def test_the_sentences_have_the_figures_of_the_records(copied: Path) -> None:
    stated = set(re.findall(r"[+−]?\d+\.\d+ ± \d+\.\d+", sentences(PAGE)))
    assert stated == claims(MEASUREMENTS)
    change(copied / "evidence" / "python-34m" / "AdamW-in-Soap-lr0.006-seed1.json")
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


def test_the_sentences_on_compositions_rest_on_settled_rows_with_three_seeds() -> None:
    text, rows = " ".join(PAGE.split()), rows_of("composed")
    for name in ("AdamW in Soap", "Cautious on AdamW in Soap"):
        assert rows[name][1:3] == ["0.006", "3"], "its best rate is inside the sweep, and has three seeds"
        assert sum(interval(rows[name][4])) < 0 < 1 < interval(rows[name][7])[0] - interval(rows[name][7])[1]
    assert "the random control was not run on this text" in text
    assert rows["Cautious on AdamW in Soap"][5] == f"control {NOT_RUN}"
    assert '"Rates apart" is unfinished, and its rows with one or two seeds' in text
    assert {cells[2] for name, cells in rows.items() if name.endswith("rates apart")} == {"1", "2"}
    assert "times fewer steps, which includes 1" in text
    more, half = interval(re.findall(r"took (\S+ ± \S+) times fewer steps, which includes 1", text)[0])
    assert more - half < 1 < more


def test_what_the_page_says_of_the_time_of_compositions() -> None:
    """The seeds of AdamW ran on another machine than the compositions, with which its runs with two rates came."""
    results = Results.read(MEASUREMENTS / "evidence")
    adamw = [r for r in results.records if (r["task"], r["setup"], r["part"]) == ("python-34m", "AdamW", 1)]
    here = [1e3 * step_seconds(r) for r in adamw if r["rest_lr"] is not None]
    assert f"a step of AdamW took {min(here):.1f} to {max(here):.1f} ms" in " ".join(PAGE.split())
    rows = rows_of("composed")
    there = float(rows["AdamW"][8].rstrip(" |"))
    factors = [interval(rows[name][7])[0] for name in ("AdamW in Soap", "Cautious on AdamW in Soap")]
    least, most = min(factors) * (1 - max(here) / there), max(factors) * (1 - min(here) / there)
    assert f"smaller by {least:.2f} to {most:.2f}" in " ".join(PAGE.split())


def test_the_page_says_of_muon_that_its_sweep_has_begun() -> None:
    rows, text = rows_of("Muon"), " ".join(PAGE.split())
    begun = {name: cells for name, cells in rows.items() if cells[2] == "1"}
    assert begun.keys() == {"Muon", "Cautious on Muon"}
    assert all("(edge)" in cells[1] for cells in begun.values())
    assert "The sweep has begun. Each row is one run, at rates that are not settled" in text
    best = min(cells[3] for name, cells in rows_of("composed").items() if name.startswith("Cautious on AdamW in Soap"))
    assert f"The best run ended at {rows['Muon'][3]}, and so did the best one of `Cautious()` in `Soap()`" in text
    assert best.startswith(rows["Muon"][3])


def test_the_page_on_rotations_has_the_same_figures() -> None:
    page = (DOCS / "how-it-works" / "rotation.md").read_text()
    first = page.partition("**34M parameters on a GPU**")[2].partition("\n\n")[0]
    figures = re.findall(r"[+−]?\d+\.\d+ ± \d+\.\d+", first)
    assert len(figures) == 5 and set(figures) <= claims(MEASUREMENTS)
    rows = rows_of("composed")
    steps = [rows[name][8].rstrip(" |") for name in ("Cautious on AdamW in Soap", "AdamW")]
    assert "with steps of {} ms and AdamW's of {}".format(*steps) in " ".join(first.split())
    other = " ".join(page.partition("**On other Python text**")[2].partition("\n\n")[0].split())
    assert re.findall(r"[+−]?\d+\.\d+ ± \d+\.\d+", other) == on_other_text()


def on_other_text() -> list[str]:
    """The figures of the older runs, on other text: of `Soap()`, and of `Cautious()` in it."""
    gain = of_gain(MEASUREMENTS / "gain")
    adamw = runs(gain, "gain", "AdamW", 1.5e-3)
    soap, cautious = (runs(gain, "gain", f"{name} squared", 6e-3) for name in ("Soap", "Cautious in Soap"))
    differences = [paired(mine, theirs) for mine, theirs in ((soap, adamw), (cautious, adamw), (cautious, soap))]
    speeds = [race([(mine[seed], adamw[seed]) for seed in adamw], "step").ratio for mine in (soap, cautious)]
    first, second, third = (said(one, sign="+") for one in differences if one is not None)
    of_soap, of_cautious = (said(one, 2) for one in speeds if one is not None)
    return [first, of_soap, second, third, of_cautious]


def rows_of(base: str) -> dict[str, list[str]]:
    """The cells of a table of 34M parameters, by setup. That of a base has its name."""
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
    change(copied / "evidence" / "python-34m" / "Cautious-on-AdamW-in-Soap-lr0.006-seed2.json")
    assert draw(copied) != picture
