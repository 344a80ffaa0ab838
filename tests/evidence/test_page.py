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
from evidence.runs import Results, final, step_seconds
from evidence.setups import POLICIES
from evidence.table import NOT_RUN, TABLES, said
from evidence_claims import (
    ADAMW,
    BEST,
    BEST_CONTROL,
    CAUTIOUS_CONTROL,
    DOCS,
    FIGURE,
    MEASUREMENTS,
    MUON,
    MUON_BEFORE,
    MUON_CAUTIOUS,
    MUON_CONTROL,
    MUON_MILD,
    MUON_OFFICIAL,
    MUON_ROWS,
    NORM_ALPHA,
    NORM_MILD,
    PAGE,
    SOAP,
    THEIR_SOAP,
    WHITENED,
    claims,
    interval,
    rows_of,
    runs,
    sentences,
    shows_nothing,
)

from selective.compare.race import race
from selective.compare.summary import paired

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
    named = [f"english-110m: {setup}" for setup in missing("english-110m", results)]
    assert len(named) == 5 and unsaid(without, results) == named
    more = Results([*results.records, {**results.of("python-34m", "AdamW")[0], "setup": "Magma on AdamW"}])
    assert "python-34m readings has no mark" in unsaid(PAGE, more)


@pytest.mark.parametrize("file", ["AdamW-in-Soap-lr0.006-seed1.json", "Muon-lr0.04-rest0.048-seed2.json"])
def test_the_sentences_have_the_figures_of_the_records(copied: Path, file: str) -> None:
    stated = set(re.findall(FIGURE, sentences(PAGE)))
    assert stated == claims(MEASUREMENTS)
    change(copied / "evidence" / "python-34m" / file)
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
    apart = [cells for name, cells in rows.items() if name.endswith("rates apart") and cells[2] != "–"]
    assert len(apart) == 3 and {cells[2] for cells in apart} == {"3"}
    assert "have twice the inner matrices' rate" in text
    assert all(float(rest) == 2 * float(lr) for lr, rest in (cells[1].split(", rest ") for cells in apart))
    nothing = text.partition("**Nothing that three seeds show**")[2].partition("**Time.**")[0]
    figures = re.findall(FIGURE, nothing)
    assert len(figures) == 5
    assert all(shows_nothing(figure) for figure in figures)


def test_the_choice_of_coordinates_helps_in_the_rotation_as_the_page_says() -> None:
    text, rows = " ".join(PAGE.split()), rows_of("composed")
    assert "**The choice of coordinates helps** in the rotation" in text
    assert sum(interval(rows["Cautious on AdamW in Soap"][5])) < 0
    assert rows[CAUTIOUS_CONTROL[0]][1:3] == ["0.003", "3"], "no best rate is at an edge"


def test_what_the_page_says_of_the_best_composition_and_of_the_other_soap() -> None:
    text, composed, of_muon = " ".join(PAGE.split()), rows_of("composed"), rows_of("Muon")
    assert "**All three together** ended lowest" in text
    assert composed[BEST[0]][1:3] == ["0.036, rest 0.006", "3"]
    evidence = Results.read(MEASUREMENTS / "evidence")
    best = runs(evidence, "python-34m", *BEST)
    for name, cells in {**composed, **of_muon}.items():
        if name in (BEST[0], f"{ADAMW[0]}, {LONGER:g} × the steps") or cells[2] != "3":
            continue
        lr, rest = re.findall(r"\d[\d.]*", cells[1])[0], re.findall(r"rest ([\d.]+)", cells[1])
        setup = name.removesuffix(", rates apart")
        found = paired(evidence.by_seed("python-34m", setup, (float(lr), float(rest[0]) if rest else None)), best)
        assert found is not None and found.sign != -1, name
    assert "**Any mask gains there.**" in text
    assert "That the choice of coordinates matters is not shown" in text
    for name in (BEST[0], NORM_ALPHA[0], NORM_MILD[0], BEST_CONTROL[0]):
        assert composed[name][2] == "3" and "(edge)" not in composed[name][1], name
    assert shows_nothing(composed[BEST[0]][5])
    assert "in steps of twice the time" in text
    their_step, our_step = (float(composed[name][8].rstrip(" |")) for name in (THEIR_SOAP[0], SOAP[0]))
    assert 1.9 < their_step / our_step < 2.1


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


def test_what_the_page_says_of_muon() -> None:
    rows, of_muon = rows_of("Muon"), " ".join(PAGE.partition("### Muon")[2].partition("## Not run yet")[0].split())
    assert "With 0.048 for AdamW's part, Muon ended at" in of_muon and rows["Muon"][1:3] == ["0.04, rest 0.048", "3"]
    masked = (MUON_CAUTIOUS, MUON_MILD, MUON_OFFICIAL)
    others = (MUON_BEFORE, MUON_ROWS, WHITENED)
    assert all(rows[name][2] == "3" and "(edge)" not in rows[name][1] for name, *_ in (*masked, *others))
    mean, half = min(interval(rows[name][4]) for name, *_ in masked)
    assert "Masks on its update hurt" in of_muon and mean - half > 0
    evidence = Results.read(MEASUREMENTS / "evidence")
    worst = max(final(run) for run in runs(evidence, "python-34m", *MUON).values())
    assert "No such run, at any rate, ended as low as Muon's seeds at its best rates" in of_muon
    assert all(final(run) > worst for name, *_ in masked for run in evidence.of("python-34m", name))
    assert "It is the choice that hurts" in of_muon
    assert interval(rows[MUON_CAUTIOUS[0]][5])[0] - interval(rows[MUON_CAUTIOUS[0]][5])[1] > 0
    assert shows_nothing(rows[MUON_CONTROL[0]][4])
    assert "A mask does not hurt, and is not shown to help, where it comes before the orthogonalisation" in of_muon
    assert all(shows_nothing(rows[name][4]) for name, *_ in (MUON_BEFORE, MUON_ROWS))
    assert "Whitening helps" in of_muon and sum(interval(rows[WHITENED[0]][4])) < 0
    assert "it has one seed, and its rates are not settled" in of_muon
    for name in ("Muon, norm controlled", "Muon, whitened, norm controlled"):
        assert rows[name][2] == "1" and float(rows[name][3]) > worst - 0.01
    assert "Bare, Muon takes torch's own step here. Masked, it is stepped by our kernels" in of_muon
    assert float(rows[MUON_MILD[0]][8].rstrip(" |")) < float(rows["Muon"][8].rstrip(" |"))


def test_the_page_on_rotations_has_the_same_figures() -> None:
    page = (DOCS / "how-it-works" / "rotation.md").read_text()
    first = page.partition("**34M parameters on a GPU**")[2].partition("\n\n")[0]
    figures = re.findall(FIGURE, first)
    assert len(figures) == 6 and set(figures) <= claims(MEASUREMENTS)
    rows = rows_of("composed")
    steps = [rows[name][8].rstrip(" |") for name in ("Cautious on AdamW in Soap", "AdamW")]
    assert "with steps of {} ms and AdamW's of {}".format(*steps) in " ".join(first.split())
    other = " ".join(page.partition("**On other Python text**")[2].partition("\n\n")[0].split())
    assert re.findall(FIGURE, other) == on_other_text()


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


def better(rows: dict[str, list[str]], base: str, column: int) -> list[str]:
    """The masks whose interval in this column lies below 0."""
    return [name for name in POLICIES if sum(interval(rows[f"{name} on {base}"][column])) < 0]


@pytest.mark.parametrize("file", ["Cautious-on-AdamW-in-Soap-lr0.006-seed2.json", "Muon-lr0.04-rest0.048-seed1.json"])
def test_the_picture_is_of_the_files(copied: Path, file: str) -> None:
    picture = (DOCS / "pictures" / "evidence.svg").read_text()
    assert draw(MEASUREMENTS) == picture, AGAIN
    change(copied / "evidence" / "python-34m" / file)
    assert draw(copied) != picture
