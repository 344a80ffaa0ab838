"""The rows of the tables: which setups are compared, and with what."""

from __future__ import annotations

from dataclasses import dataclass, replace

from evidence.plan import (
    APART,
    AVERAGED,
    CANDIDATES,
    DECAYS,
    FINE_TUNED,
    HOME,
    LONGER,
    MASKED,
    MORE_NORMS,
    MUON_MASKS,
    MUON_MORE,
    MUON_NORMS,
    NORMS,
    OUR_MUON,
    RIVALS,
    SHORTER,
    VARIANTS,
)
from evidence.ranking import best_setups
from evidence.runs import Results
from evidence.setups import POLICIES, READINGS, control_of, has_control
from evidence.sweeps import first_rest

AT_ANOTHER_S_BEST = {AVERAGED, *VARIANTS, OUR_MUON}  # at HOME they have no sweep of their own


@dataclass(frozen=True)
class Row:
    """A setup, the one with which it is compared, and the share of the steps that it has.

    `apart` is true if what is no inner matrix has a rate of its own, which was swept, too; `base_apart` if the setup
    with which it is compared has.
    """

    setup: str
    base: str
    part: float = 1.0
    apart: bool = False
    base_apart: bool = False

    @property
    def label(self) -> str:
        name = f"{self.setup}, rates apart" if self.tuned_apart else self.setup
        return name if self.part == 1 else f"{name}, {self.part:g} × the steps"

    @property
    def baseline(self) -> Row:
        """The row with which this one is compared. It is its own if it is compared with nothing."""
        apart = self.base_apart or first_rest(self.base) is not None
        return Row(self.base, self.base, apart=apart, base_apart=self.base_apart)

    @property
    def control(self) -> Row | None:
        """The row of the setup's control, if it has one. A control has none itself."""
        return None if self.tuned_apart or not has_control(self.setup) else _row(control_of(self.setup), self.base)

    @property
    def tuned_apart(self) -> bool:
        """True if the row has rates of which its control knows nothing."""
        return self.apart and first_rest(self.setup) is None


def _row(setup: str, base: str) -> Row:
    """The row of a setup at one rate, or at two if it has two bases."""
    return Row(setup, base, apart=first_rest(setup) is not None)


def masked_rows(base: str) -> list[Row]:
    """A base, with more steps, and with each policy and that policy's control."""
    masked = [f"{name} on {base}" for name in POLICIES]
    with_controls = [Row(setup, base) for name in masked for setup in (name, control_of(name))]
    return [Row(base, base), Row(base, base, LONGER), *with_controls]


COMPOSED = [
    *(row for setup in APART for row in (Row(setup, "AdamW"), Row(setup, "AdamW", apart=True))),
    Row("AdamW", "AdamW", LONGER, apart=True),
    Row(control_of(APART[-1]), "AdamW"),
    Row(DECAYS[0], "AdamW"),
    Row(control_of(DECAYS[0]), "AdamW"),
    *(_row(setup, "AdamW") for setup in (*DECAYS[1:], AVERAGED, *RIVALS)),
    Row(RIVALS[0], "AdamW", apart=True),
    *(_row(setup, "AdamW") for setup in NORMS),
    replace(_row(NORMS[-1], "AdamW"), part=SHORTER),
    _row(control_of(NORMS[-1]), "AdamW"),
    *(_row(setup, "AdamW") for setup in (*VARIANTS, *MORE_NORMS)),
]
MUON = [
    _row(setup, "Muon")
    for setup in ("Muon", OUR_MUON, MUON_MASKS[0], control_of(MUON_MASKS[0]), *MUON_MASKS[1:], *MUON_MORE, *MUON_NORMS)
]
READINGS_ROWS = [Row("AdamW", "AdamW"), *(Row(f"{name} on AdamW", "AdamW") for name in READINGS)]
FINE_ROWS = [
    Row(setup, "AdamW") for row in FINE_TUNED for setup in ((row, control_of(row)) if row in MASKED else (row,))
]
PICTURE_ROWS = [*masked_rows("AdamW"), *(Row(setup, "AdamW") for setup in APART[1:]), _row("Muon", "AdamW")]


def short_list(results: Results) -> list[Row]:
    """AdamW, Muon, and the best setups at 34M, as far as they are known. All have two rates, AdamW as well."""
    best = best_setups(results, HOME, CANDIDATES, 2)
    rows = [Row(setup, "AdamW", apart=True, base_apart=True) for setup in ("AdamW", "Muon", *best)]
    return [rows[0], replace(rows[0], part=LONGER), *rows[1:]]
