"""The notes below the results: what the numbers do not say by themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from selective.compare.config import CompareConfig
from selective.compare.contenders import Contender, Pair
from selective.compare.train import Record

MOST_FAILURES = 5  # that are written out


def notes_on(
    config: CompareConfig,
    field: Sequence[Contender],
    best: Mapping[int, Pair | None],
    n: int,
    failed: Sequence[Record],
) -> list[str]:
    """Notes on a summary over `n` seeds, in which contenders are best at `best`, and of runs that failed."""
    notes = []
    if n < len(config.seeds):
        notes.append(f"{n} of {len(config.seeds)} seeds are complete; the others are left out. --resume goes on.")
    notes += _notes_on_failures(failed)
    if all(len(c.pairs) == 1 for c in field):
        notes.append(
            "One learning rate: a policy that changes the size of the update changes the learning rate in disguise. "
            "Sweep it with --lr."
        )
    else:
        notes += _notes_on_rates(field, best)
    policies = sum(c.role == "policy" for c in field)
    if policies > 1 and n > 1:
        notes.append(
            f"Intervals are 95 % each, not adjusted for {policies} policies being compared, nor for choosing the "
            "learning rate by the same losses."
        )
    return notes


def at_an_edge(contender: Contender, pair: Pair | None) -> bool:
    """True if one rate of `pair`, the contender's best, is the lowest or highest of several that were tried."""
    if pair is None:
        return False
    swept = ((pair[0], contender.rates), (pair[1], contender.rest_rates))
    return any(len(rates) > 1 and rate in (min(rates), max(rates)) for rate, rates in swept)


def _notes_on_failures(failed: Sequence[Record]) -> list[str]:
    if not failed:
        return []
    notes = [f"Failed: {record['key']}: {record['failed']}" for record in failed[:MOST_FAILURES]]
    if len(failed) > MOST_FAILURES:
        notes.append(f"Failed: {len(failed) - MOST_FAILURES} more, listed in results.json.")
    count = f"{len(failed)} runs" if len(failed) > 1 else "1 run"
    notes.append(f"{count} failed, and rows and differences rest on the other seeds. --resume tries again.")
    return notes


def _notes_on_rates(field: Sequence[Contender], best: Mapping[int, Pair | None]) -> list[str]:
    """Notes on contenders that were best at an end of their sweep, or had one learning rate only."""
    notes = []
    firsts = [(c, c.rates, pair[0]) for c in field if (pair := best[c.index]) is not None]
    seconds = [(c, c.rest_rates, pair[1]) for c in field if (pair := best[c.index]) is not None]
    for name, sweeps in (("learning rate", firsts), ("second learning rate", seconds)):
        swept = [(c, rates, rate) for c, rates, rate in sweeps if len(rates) > 1]
        for word, end in (("lowest", min), ("highest", max)):
            for edge in sorted({end(rates) for _, rates, _ in swept}):
                labels = [c.label for c, rates, rate in swept if end(rates) == edge == rate]
                if labels:
                    notes.append(
                        f"Best at the {word} {name} swept, {edge:g}: {', '.join(labels)}. A better one may lie beyond "
                        "it."
                    )
    single = [f"{c.label} ({c.rates[0]:g})" for c in field if len(c.rates) == 1]
    if single:
        notes.append(f"At one learning rate only, which was fixed beforehand: {', '.join(single)}.")
    return notes
