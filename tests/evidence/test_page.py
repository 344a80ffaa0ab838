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
    ADAMW_APART,
    ADAMW_APART_LONGER,
    BEST,
    BEST_CONTROL,
    CAUTIOUS_APART,
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
    NORM,
    NORM_ALPHA,
    NORM_MILD,
    OUR_MUON,
    PAGE,
    SOAP,
    SOAP_APART,
    SOAP_NORM,
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
    assert len(named) == 7 and unsaid(without, results) == named
    adamw = results.by_seed("python-34m", "AdamW", (3e-3, None))
    more = Results([*results.records, {**adamw[0], "setup": "Magma on AdamW"}])
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


def nothing_shown(text: str, begins: str, ends: str) -> list[str]:
    """The figures of a list item that says that nothing is shown."""
    return re.findall(FIGURE, text.partition(begins)[2].partition(ends)[0])


def test_the_sentences_on_compositions_rest_on_settled_rows_with_three_seeds() -> None:
    text, rows = " ".join(PAGE.split()), rows_of("composed")
    for name in ("AdamW in Soap", "Cautious on AdamW in Soap"):
        assert rows[name][1:3] == ["0.006", "3"], "its best rate is inside the sweep, and has three seeds"
        assert sum(interval(rows[name][4])) < 0 < 1 < interval(rows[name][7])[0] - interval(rows[name][7])[1]
    figures = nothing_shown(text, "**Nothing that three seeds show**, against the same without them", "**Time.**")
    assert len(figures) == 4 and all(shows_nothing(figure) for figure in figures)
    assert "in steps of twice the time" in text
    assert 1.9 < milliseconds(rows[THEIR_SOAP[0]]) / milliseconds(rows[SOAP[0]]) < 2.1
    assert "takes three times the time" in text
    assert 2.9 < milliseconds(rows["random like CautiousDecay on AdamW in Soap"]) / milliseconds(rows[SOAP[0]]) < 3.1


def milliseconds(cells: list[str]) -> float:
    return float(cells[8].rstrip(" |"))


def test_the_choice_of_coordinates_helps_in_the_rotation_as_the_page_says() -> None:
    text, rows = " ".join(PAGE.split()), rows_of("composed")
    assert "**The choice of coordinates helps** in the rotation" in text
    assert sum(interval(rows["Cautious on AdamW in Soap"][5])) < 0
    assert rows[CAUTIOUS_CONTROL[0]][1:3] == ["0.003", "3"], "no best rate is at an edge"


def test_what_the_page_says_of_two_rates() -> None:
    text, rows = (
        " ".join(PAGE.partition("### Two learning rates")[2].partition("### Muon")[0].split()),
        rows_of("two rates"),
    )
    one_seed = {"AdamW, the betas of Soap, rates apart", "Cautious on NAdam in Soap, norm controlled"}
    assert {name for name in list(rows)[2:] if rows[name][2] not in ("3", "–")} == one_seed
    unfinished = {name for name in rows if "unfinished" in rows[name][1]}
    assert unfinished == {NORM[0], SOAP_NORM[0]} and "**Two sweeps are unfinished**" in text
    assert "The rate of the rest is eight times that of the matrices" in text
    assert rows["AdamW, rates apart"][1] == "0.0015, rest 0.012" and ADAMW_APART[2] == 8 * ADAMW_APART[1]
    assert "AdamW with those of `Soap()`, at AdamW's rates, ended far above, with one seed" in text
    assert float(rows["AdamW, the betas of Soap, rates apart"][4]) > 0.1
    assert "No difference is shown from AdamW with 1.5 times the steps" in text
    assert shows_nothing(difference(BEST, ADAMW_APART_LONGER))
    for name in (SOAP_APART[0], CAUTIOUS_APART[0]):
        assert sum(interval(rows[f"{name}, rates apart"][4])) < 0
    assert sum(interval(rows[BEST[0]][4])) < 0 < 1 < interval(rows[BEST[0]][7])[0] - interval(rows[BEST[0]][7])[1]
    assert shows_nothing(difference(CAUTIOUS_APART, SOAP_APART)) and "Against `Soap()` that is" in text
    assert "With Nesterov's momentum it ended higher, with one seed" in text
    assert float(rows["Cautious on NAdam in Soap, norm controlled"][3]) > float(rows[BEST[0]][3].split(" ± ")[0])
    figures = nothing_shown(text, "**Nothing that three seeds show**", "With Nesterov")
    assert len(figures) == 2 and all(shows_nothing(figure) for figure in figures)
    assert "in steps of nearly twice the time" in text
    assert 1.85 < milliseconds(rows["pytorch_optimizer SOAP, rates apart"]) / milliseconds(rows[BEST[0]]) < 2


def difference(mine: tuple[str, float, float | None, float], theirs: tuple[str, float, float | None, float]) -> str:
    evidence = Results.read(MEASUREMENTS / "evidence")
    found = paired(runs(evidence, "python-34m", *mine), runs(evidence, "python-34m", *theirs))
    assert found is not None
    return said(found)


def test_no_row_is_shown_to_end_lower_than_the_best_composition() -> None:
    assert "No row is shown to end lower" in " ".join(PAGE.split())
    evidence = Results.read(MEASUREMENTS / "evidence")
    best, compared = runs(evidence, "python-34m", *BEST), 0
    for name, cells in {**rows_of("composed"), **rows_of("two rates"), **rows_of("Muon")}.items():
        setup = name.removesuffix(" × the steps").replace(", rates apart", "").partition(f", {LONGER:g}")[0]
        if setup == BEST[0] or cells[2] != "3" or name.endswith("0.5 × the steps"):
            continue
        lr, rest = re.findall(r"\d[\d.]*", cells[1])[0], re.findall(r"rest ([\d.]+)", cells[1])
        point = (float(lr), float(rest[0]) if rest else None)
        found = paired(evidence.by_seed("python-34m", setup, point, LONGER if name.endswith("steps") else 1.0), best)
        assert found is not None and found.sign != -1, name
        compared += 1
    assert compared > 25


def test_what_the_page_says_of_masks_in_the_best_composition() -> None:
    text, rows = " ".join(PAGE.split()), rows_of("two rates")
    assert "**Masks gain a little there.**" in text
    for name in (BEST[0], NORM_ALPHA[0], NORM_MILD[0], BEST_CONTROL[0]):
        assert rows[name][1:3] == ["0.036, rest 0.006", "3"], name
    assert rows[SOAP_NORM[0]][1:3] == ["0.036, rest 0.006 (sweep unfinished)", "3"]
    assert [shows_nothing(difference(mask, SOAP_NORM)) for mask in (BEST, NORM_ALPHA, NORM_MILD)] == [
        False,
        False,
        True,
    ]
    assert "That the choice of coordinates matters there is not shown" in text
    assert shows_nothing(rows[BEST[0]][5]) and shows_nothing(difference(BEST_CONTROL, SOAP_NORM))


def test_what_the_page_says_of_the_time_of_compositions() -> None:
    """The seeds of AdamW ran on another machine than the compositions, with which its runs with two rates came."""
    results = Results.read(MEASUREMENTS / "evidence")
    adamw = [r for r in results.records if (r["task"], r["setup"], r["part"]) == ("python-34m", "AdamW", 1)]
    here = [1e3 * step_seconds(r) for r in adamw if r["rest_lr"] is not None and r["alone"]]
    assert f"a step of AdamW took {min(here):.1f} to {max(here):.1f} ms" in " ".join(PAGE.split())
    rows = rows_of("composed")
    there = float(rows["AdamW"][8].rstrip(" |"))
    factors = [interval(rows[name][7])[0] for name in ("AdamW in Soap", "Cautious on AdamW in Soap")]
    least, most = min(factors) * (1 - max(here) / there), max(factors) * (1 - min(here) / there)
    assert f"smaller by {least:.2f} to {most:.2f}" in " ".join(PAGE.split())


def test_what_the_page_says_of_muon() -> None:
    rows, of_muon = rows_of("Muon"), " ".join(PAGE.partition("### Muon")[2].partition("## Not run yet")[0].split())
    assert rows["Muon"][1:3] == ["0.04, rest 0.048", "3"] and rows[OUR_MUON[0]][2] == "3"
    assert "No difference is shown from AdamW with 1.5 times the steps" in of_muon
    assert "No difference is shown in the time to Muon's loss" in of_muon
    assert shows_nothing(difference(OUR_MUON, ADAMW_APART_LONGER)) and shows_nothing(difference(OUR_MUON, MUON))
    masked = (MUON_CAUTIOUS, MUON_MILD, MUON_OFFICIAL)
    others = (MUON_BEFORE, MUON_ROWS, WHITENED)
    assert all(rows[name][2] == "3" for name, *_ in (*masked, *others))
    mean, half = min(interval(rows[name][4]) for name, *_ in masked)
    assert "Masks on its update hurt" in of_muon and mean - half > 0
    evidence = Results.read(MEASUREMENTS / "evidence")
    worst = max(final(run) for run in runs(evidence, "python-34m", *MUON).values())
    assert "No such run ended as low as Muon's seeds at its best rates" in of_muon
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
    assert (
        "`Cautious()` on Muon ended lower with half of its first rate, with one seed, and still above Muon" in of_muon
    )
    assert "unfinished" in rows[MUON_CAUTIOUS[0]][1]
    half_of_it = evidence.points("python-34m", MUON_CAUTIOUS[0])[MUON_CAUTIOUS[1] / 2, MUON_CAUTIOUS[2]]
    assert worst < half_of_it < final(runs(evidence, "python-34m", *MUON_CAUTIOUS)[0])
    assert (
        "and so do the whitened ones and those with norm control. Our kernels step all others in less time" in of_muon
    )
    torch_s = [name for name in list(rows)[2:] if name == "Muon" or "whitened" in name or "norm controlled" in name]
    ours = [name for name in list(rows)[2:] if name not in torch_s]
    assert all(milliseconds(rows[name]) < 0.9 * milliseconds(rows["Muon"]) for name in ours) and len(ours) == 7
    assert all(milliseconds(rows[name]) > 0.95 * milliseconds(rows["Muon"]) for name in torch_s) and len(torch_s) == 4


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
