"""The rows of the tables: which setups are compared, and with what."""

from __future__ import annotations

from dataclasses import dataclass, replace

from evidence.plan import (
    ALONE_APART,
    APART,
    AT_ITS_BEST,
    AVERAGED,
    AVERAGED_BEST,
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
    SCREENED,
    SHORTER,
    beside,
)
from evidence.ranking import best_setups
from evidence.runs import Results
from evidence.setups import POLICIES, READINGS, control_of, has_control
from evidence.sweeps import first_rest


@dataclass(frozen=True)
class Row:
    """A setup, the one with which it is compared, and the share of the steps that it has.

    `apart` is true if what is no inner matrix has a rate of its own, which was swept, too; `base_apart` if the setup
    with which it is compared has. A row with `at` was not swept: it has the rates that were best for that setup.
    """

    setup: str
    base: str
    part: float = 1.0
    apart: bool = False
    base_apart: bool = False
    at: str | None = None

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
        """The row of the setup's control, if it has one. It has none where the steps are not all of them."""
        if self.tuned_apart or self.part != 1 or not has_control(self.setup):
            return None
        control = _row(control_of(self.setup), self.base)
        return control if self.at is None else replace(control, at=self.setup)

    @property
    def rates_of(self) -> Row:
        """The row whose sweep says at which rates this one stands."""
        return self if self.at is None else replace(self, setup=self.at, at=None)

    @property
    def tuned_apart(self) -> bool:
        """True if the row has rates of which its control knows nothing."""
        return self.apart and first_rest(self.setup) is None


def _row(setup: str, base: str) -> Row:
    """The row of a setup at one rate, or at two if it has two bases; then AdamW has two as well."""
    apart = first_rest(setup) is not None
    at = AT_ITS_BEST.get(setup) or SCREENED.get(setup)
    return Row(setup, base, apart=apart, base_apart=apart and base == "AdamW", at=at)


def _apart(setup: str) -> Row:
    """The row of a setup with two rates, against AdamW with two."""
    return Row(setup, "AdamW", apart=True, base_apart=True)


def masked_rows(base: str) -> list[Row]:
    """A base, with more steps, and with each policy and that policy's control."""
    masked = [f"{name} on {base}" for name in POLICIES]
    with_controls = [Row(setup, base) for name in masked for setup in (name, control_of(name))]
    return [Row(base, base), Row(base, base, LONGER), *with_controls]


BETAS = [*SCREENED][-1]
COMPOSED = [
    *(Row(setup, "AdamW") for setup in APART),
    Row(control_of(APART[-1]), "AdamW"),
    Row(DECAYS[0], "AdamW"),
    Row(control_of(DECAYS[0]), "AdamW"),
    *(_row(setup, "AdamW") for setup in (DECAYS[1], AVERAGED, *RIVALS)),
]
TWO_RATES = [
    _apart("AdamW"),
    replace(_apart("AdamW"), part=LONGER),
    replace(_apart(BETAS), at="AdamW"),
    *(_apart(setup) for setup in (*ALONE_APART, *APART[1:], RIVALS[0])),
    *(_row(setup, "AdamW") for setup in NORMS),
    replace(_row(NORMS[-1], "AdamW"), part=SHORTER),
    _row(control_of(NORMS[-1]), "AdamW"),
    *(_row(setup, "AdamW") for setup in (*MORE_NORMS, AVERAGED_BEST, *[*SCREENED][:-1])),
]
MUON = [
    _row(setup, "Muon")
    for setup in ("Muon", OUR_MUON, MUON_MASKS[0], control_of(MUON_MASKS[0]), *MUON_MASKS[1:], *MUON_MORE, *MUON_NORMS)
]
READINGS_ROWS = [Row("AdamW", "AdamW"), *(Row(f"{name} on AdamW", "AdamW") for name in READINGS)]
FINE_ROWS = [
    Row(setup, "AdamW") for row in FINE_TUNED for setup in ((row, control_of(row)) if row in MASKED else (row,))
]
PICTURE_ROWS = [*masked_rows("AdamW"), *(Row(setup, "AdamW") for setup in APART[1:]), Row("Muon", "AdamW", apart=True)]


def short_list(results: Results) -> list[Row]:
    """AdamW, Muon, and the best setups at 34M, as far as they are known. All have two rates, AdamW as well."""
    rows = [_apart("AdamW"), replace(_apart("AdamW"), part=LONGER), _apart("Muon")]
    for setup in best_setups(results, HOME, CANDIDATES, 2):
        rows.append(_apart(setup))
        rows += [replace(_apart(other), at=setup) for other in beside(setup)]
    return rows
