"""The comparisons in the sentences of docs/evidence.md, and the figures that the records give for them."""

from __future__ import annotations

import re
from pathlib import Path

from evidence.plan import HOME, LONGER, SHORTER
from evidence.runs import Record, Results
from evidence.table import TABLES, said

from selective.compare.race import race
from selective.compare.summary import paired

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "evidence.md").read_text()
MEASUREMENTS = DOCS / "measurements"
FIGURE = r"[+−]?\d+\.\d+ ± \d+\.\d+"

# Setups at their best rates: setup, rate of the inner matrices, rate of the rest (None: the same), part of the steps.
ADAMW = ("AdamW", 3e-3, None, 1.0)
ADAMW_LONGER = ("AdamW", 3e-3, None, LONGER)
ADAMW_APART = ("AdamW", 1.5e-3, 12e-3, 1.0)
ADAMW_APART_LONGER = ("AdamW", 1.5e-3, 12e-3, LONGER)
ALPHA = ("AlphaConsistency on AdamW", 3e-3, None, 1.0)
ALPHA_CONTROL = ("random like AlphaConsistency on AdamW", 3e-3, None, 1.0)
LION = ("Lion", 3e-4, None, 1.0)
LION_ALPHA = ("AlphaConsistency on Lion", 3e-4, None, 1.0)
LION_ALPHA_CONTROL = ("random like AlphaConsistency on Lion", 3e-4, None, 1.0)
LION_CAUTIOUS = ("Cautious on Lion", 3e-4, None, 1.0)
LION_CAUTIOUS_CONTROL = ("random like Cautious on Lion", 3e-4, None, 1.0)
SOAP = ("AdamW in Soap", 6e-3, None, 1.0)
SOAP_APART = ("AdamW in Soap", 6e-3, 12e-3, 1.0)
CAUTIOUS = ("Cautious on AdamW in Soap", 6e-3, None, 1.0)
CAUTIOUS_APART = ("Cautious on AdamW in Soap", 6e-3, 12e-3, 1.0)
DECAY = ("CautiousDecay on AdamW in Soap", 6e-3, None, 1.0)
CAUTIOUS_DECAY = ("Cautious, CautiousDecay on AdamW in Soap", 6e-3, None, 1.0)
AVERAGED = ("Cautious on AdamW in Soap, tail averaged", 6e-3, None, 1.0)
CAUTIOUS_CONTROL = ("random like Cautious on AdamW in Soap", 3e-3, None, 1.0)
DECAY_CONTROL = ("random like CautiousDecay on AdamW in Soap", 6e-3, None, 1.0)
THEIR_SOAP = ("pytorch_optimizer SOAP", 6e-3, None, 1.0)
THEIR_SOAP_APART = ("pytorch_optimizer SOAP", 6e-3, 24e-3, 1.0)
NORM = ("AdamW, norm controlled", 1.8e-2, 12e-3, 1.0)
SOAP_NORM = ("AdamW in Soap, norm controlled", 3.6e-2, 6e-3, 1.0)
BEST = ("Cautious on AdamW in Soap, norm controlled", 3.6e-2, 6e-3, 1.0)
BEST_SHORTER = (*BEST[:3], SHORTER)
BEST_REFRESHED = ("Cautious on AdamW in Soap, norm controlled, refreshed every 3", 3.6e-2, 6e-3, 1.0)
BEST_CONTROL = ("random like Cautious on AdamW in Soap, norm controlled", 3.6e-2, 6e-3, 1.0)
BEST_AVERAGED = ("Cautious on AdamW in Soap, norm controlled, tail averaged", 3.6e-2, 6e-3, 1.0)
NORM_ALPHA = ("AlphaConsistency on AdamW in Soap, norm controlled", 3.6e-2, 6e-3, 1.0)
NORM_MILD = ("MGUP mild on AdamW in Soap, norm controlled", 3.6e-2, 6e-3, 1.0)
MUON = ("Muon", 4e-2, 4.8e-2, 1.0)
OUR_MUON = ("Muon, by our kernels", 4e-2, 4.8e-2, 1.0)
MUON_CAUTIOUS = ("Cautious on Muon", 4e-2, 4.8e-2, 1.0)
MUON_MILD = ("MGUP mild on Muon", 2e-2, 2.4e-2, 1.0)
MUON_OFFICIAL = ("MGUP official on Muon", 2e-2, 2.4e-2, 1.0)
MUON_CONTROL = ("random like Cautious on Muon", 2e-2, 4.8e-2, 1.0)
MUON_BEFORE = ("Muon, Cautious before the orthogonalisation", 2e-2, 2.4e-2, 1.0)
MUON_ROWS = ("Muon, Cautious by rows", 2e-2, 4.8e-2, 1.0)
WHITENED = ("Muon, whitened", 4e-2, 4.8e-2, 1.0)

# What the page's sentences compare: final losses, and steps or seconds to the other's final loss.
DIFFERENCES = (
    (ALPHA, ADAMW), (ADAMW_LONGER, ADAMW), (ALPHA, ALPHA_CONTROL), (ALPHA_CONTROL, ADAMW),
    (LION_ALPHA, LION), (LION_CAUTIOUS, LION), (LION_CAUTIOUS, LION_CAUTIOUS_CONTROL), (LION_ALPHA_CONTROL, LION),
    (SOAP, ADAMW), (CAUTIOUS, ADAMW), (CAUTIOUS, SOAP), (CAUTIOUS, CAUTIOUS_CONTROL), (CAUTIOUS_CONTROL, SOAP),
    (THEIR_SOAP, SOAP), (DECAY, SOAP), (DECAY, DECAY_CONTROL), (CAUTIOUS_DECAY, CAUTIOUS), (AVERAGED, CAUTIOUS),
    (ADAMW_APART, ADAMW), (SOAP_APART, ADAMW_APART), (CAUTIOUS_APART, ADAMW_APART), (CAUTIOUS_APART, SOAP_APART),
    (NORM, ADAMW_APART), (SOAP_NORM, SOAP_APART), (BEST, CAUTIOUS_APART),
    (BEST, ADAMW_APART), (BEST, ADAMW_APART_LONGER), (BEST_SHORTER, ADAMW_APART),
    (BEST, SOAP_NORM), (NORM_ALPHA, SOAP_NORM), (NORM_MILD, SOAP_NORM), (BEST, BEST_CONTROL), (BEST_CONTROL, SOAP_NORM),
    (BEST, THEIR_SOAP_APART), (THEIR_SOAP_APART, SOAP_APART), (BEST_AVERAGED, BEST), (BEST_REFRESHED, BEST),
    (OUR_MUON, ADAMW_APART), (OUR_MUON, ADAMW_APART_LONGER), (OUR_MUON, MUON), (BEST, OUR_MUON),
    (MUON_CAUTIOUS, MUON), (MUON_MILD, MUON), (MUON_OFFICIAL, MUON),
    (MUON_CAUTIOUS, MUON_CONTROL), (MUON_CONTROL, MUON),
    (MUON_BEFORE, MUON), (MUON_ROWS, MUON), (WHITENED, MUON), (WHITENED, BEST),
)  # fmt: skip
RATIOS = (
    (ALPHA, ADAMW, "step"), (LION_ALPHA, LION, "step"),
    (SOAP, ADAMW, "step"), (SOAP, ADAMW, "seconds"), (CAUTIOUS, ADAMW, "step"), (CAUTIOUS, ADAMW, "seconds"),
    (ADAMW_APART, ADAMW, "step"), (ADAMW_APART, ADAMW, "seconds"),
    *((mine, ADAMW_APART, axis) for mine in (SOAP_APART, CAUTIOUS_APART, NORM, BEST, OUR_MUON)
      for axis in ("step", "seconds")),
    (MUON, ADAMW_APART, "seconds"), (BEST, OUR_MUON, "seconds"),
)  # fmt: skip

# By task: pairs whose final losses are compared, and pairs of which one races to the other's final loss
COMPARED = {HOME: (DIFFERENCES, RATIOS)}


def runs(
    results: Results, task: str, setup: str, lr: float, rest_lr: float | None = None, part: float = 1.0
) -> dict[int, Record]:
    """The three runs of a setup at its rates, by seed."""
    mine = results.by_seed(task, setup, (lr, rest_lr), part)
    assert mine.keys() == {0, 1, 2}, (task, setup)
    return mine


def claims(measurements: Path) -> set[str]:
    """The means with their intervals that the page's sentences have."""
    evidence = Results.read(measurements / "evidence")
    found = set()
    for task, (differences, ratios) in COMPARED.items():
        by_seed = {name: runs(evidence, task, *name) for pair in (*differences, *ratios) for name in pair[:2]}
        for mine, theirs in differences:
            difference = paired(by_seed[mine], by_seed[theirs])
            assert difference is not None
            found.add(said(difference, sign="+"))
        for mine, theirs, axis in ratios:
            ratio = race([(by_seed[mine][seed], by_seed[theirs][seed]) for seed in by_seed[theirs]], axis).ratio
            assert ratio is not None, (task, mine, theirs, axis)
            found.add(said(ratio, 2))
    return found


def sentences(page: str) -> str:
    """The page's sentences on its records, without the tables that are made of them and without the demo."""
    first = page.partition("## Should you use this")[2].partition("## Does selection help")[0]
    rest = page.partition("## With 34M parameters")[2].partition("## Not run yet")[0]
    return first + re.sub(r"<!-- evidence: [^>]+ -->\n\n(\|.*\n)*", "", rest)


def rows_of(table: str) -> dict[str, list[str]]:
    """The cells of a table by the labels of its rows. Tables of 34M parameters need no more than their last word."""
    name = table if table in TABLES else f"{HOME} {table}"
    lines = TABLES[name](Results.read(MEASUREMENTS / "evidence"))
    return {line[2:].partition(" | ")[0]: line.split(" | ") for line in lines}


def interval(cell: str) -> tuple[float, float]:
    """A mean and half of its interval."""
    mean, half = (float(number.replace("−", "-")) for number in cell.split(" ± "))
    return mean, half


def shows_nothing(cell: str) -> bool:
    """True if the interval includes 0."""
    mean, half = interval(cell)
    return mean - half < 0 < mean + half
