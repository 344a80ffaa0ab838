"""The plan of `gain.py`: its runs in their order, and the results of those that are done."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evidence.earlier import of_gain

from selective import AdaDiag, CautiousDecay, Preconditioner, RandomDecay, Soap
from selective.policies import Decay

MASKS = ("MGUP", "Cautious")
HALF = 0.5  # the share of the steps that the paper's "twice as fast" would take
SHORTER = (HALF, 0.6)
# carry="rotate", because the stored runs were made with it, before there was another.
SPACES: dict[str, Preconditioner] = {
    "Soap": Soap(
        solver="cholesky", carry="rotate", precision="float32"
    ),  # spans the same space as its QR, in less time
    "AdaDiag++": AdaDiag(sides="two", refresh_every=50, carry="rotate"),
    "AdaDiag": AdaDiag(sides="one", refresh_every=50, carry="rotate"),
}
# The same with second moments that follow by the squared maps, and AdaDiag++ with bases that move further.
SQUARED: dict[str, Preconditioner] = {
    "Soap squared": Soap(solver="cholesky", precision="float32"),
    "AdaDiag++ squared": AdaDiag(sides="two", refresh_every=50),
    "AdaDiag++ 200": AdaDiag(sides="two", refresh_every=200, carry="rotate"),
    "AdaDiag++ 200 squared": AdaDiag(sides="two", refresh_every=200),
}
# The one that is fastest on a GPU, for runs whose time counts.
TIMED: dict[str, Preconditioner] = {"Soap tf32": Soap(solver="cholesky", precision="tf32")}
DECAYS: dict[str, Decay] = {
    "AdamW with CautiousDecay": CautiousDecay(),
    "random like AdamW with CautiousDecay": RandomDecay(),
}
RATES: dict[str, tuple[float, ...]] = {
    "AdamW": (7.5e-4, 1.5e-3, 3e-3, 6e-3),
    "Soap": (1.5e-3, 3e-3, 6e-3, 1.2e-2),
    "AdaDiag++": (1e-3, 2e-3, 4e-3),
    "AdaDiag": (1e-3, 2e-3, 4e-3),
    "Muon": (5e-3, 1e-2, 2e-2, 4e-2),
    "pytorch_optimizer SOAP": (1.5e-3, 3e-3, 6e-3, 1.2e-2),
    "Adafactor": (2e-2, 4e-2, 8e-2),
    "Adafactor in AdaDiag": (2e-2, 4e-2, 8e-2),
    "Adafactor in AdaDiag++": (2e-2, 4e-2, 8e-2),
}


@dataclass(frozen=True)
class Run:
    """One training run. `part` is its share of the steps, at whose end the schedule ends, too."""

    setup: str
    lr: float
    seed: int = 0
    part: float = 1.0

    @property
    def file(self) -> str:
        plain = "".join(c if c.isalnum() or c in "+-" else "-" for c in self.setup)
        return f"{plain}-lr{self.lr:g}-seed{self.seed}{'' if self.part == 1 else f'-part{self.part:g}'}.json"


def plan(done: Callable[[], list[dict[str, Any]]]) -> Iterator[Run]:
    """Yield the runs in their order. Runs that depend on the results of others come once all of those are done."""
    sweeps = ("AdamW", "Soap", "AdaDiag++", "AdaDiag", "Muon", "pytorch_optimizer SOAP")
    for setup in sweeps:
        yield from (Run(setup, lr) for lr in RATES[setup])
    records = done()
    swept = {(r["setup"], r["lr"]) for r in records if r["seed"] == 0 and r["part"] == 1}
    space = min(SPACES, key=lambda name: best(records, name)[1])
    lr = best(records, space)[0]

    def all_swept(setups: Iterable[str]) -> bool:
        return all((setup, lr) in swept for setup in setups for lr in RATES[setup])

    known = all_swept(("AdamW", *SPACES))
    if known:
        for policy in MASKS:
            yield Run(f"{policy} in {space}", lr)
            yield Run(f"random like {policy} in {space}", lr)
    masked = known and all((f"{policy} in {space}", lr) in swept for policy in MASKS)
    mask = min(MASKS, key=lambda policy: best(records, f"{policy} in {space}")[1])
    for seed in (1, 2) if masked else ():
        yield Run("AdamW", best(records, "AdamW")[0], seed)
        for setup in (space, f"{mask} in {space}", f"random like {mask} in {space}"):
            yield Run(setup, lr, seed)
    for setup in ("Adafactor", "Adafactor in AdaDiag", "Adafactor in AdaDiag++"):
        yield from (Run(setup, lr) for lr in RATES[setup])
    for setup in ("AdamW", "Muon", "pytorch_optimizer SOAP"):
        if all_swept([setup]):
            yield Run(setup, best(records, setup)[0], part=HALF)
    for part in SHORTER if masked else ():
        for seed in (0, 1, 2):
            yield from (Run(setup, lr, seed, part) for setup in (space, f"{mask} in {space}"))


def carries() -> Iterator[Run]:
    """Yield runs with second moments that follow by the squared maps, at the rates that were best without."""
    for seed in (0, 1, 2):
        for setup in ("Soap squared", "Cautious in Soap squared"):
            yield Run(setup, 6e-3, seed)
    for seed in (0, 1, 2):
        for setup in ("AdaDiag++ 200", "AdaDiag++ 200 squared", "AdaDiag++ squared", "AdaDiag++"):
            yield Run(setup, 2e-3, seed)
    for setup in ("AdaDiag++ 200", "AdaDiag++ 200 squared", "AdaDiag++ squared", "AdaDiag++"):
        yield Run(setup, 4e-3)


def decays() -> Iterator[Run]:
    """Yield runs of selective decay, its random control and AdamW, at the best rate of AdamW and at its neighbours."""
    for seed in (0, 1, 2):
        yield from (Run(setup, 1.5e-3, seed) for setup in ("AdamW", *DECAYS))
    yield from (Run(setup, lr) for lr in (7.5e-4, 3e-3) for setup in DECAYS)


def times() -> Iterator[Run]:
    """Yield runs whose times are compared, AdamW's and a masked rotation's, at the best rates and at their neighbours.

    Each is to have the device to itself. Seeds come first, AdamW and the other in turns.
    """
    pairs = (("AdamW", 1.5e-3), *((f"Cautious in {space}", 6e-3) for space in TIMED))
    for seed in (0, 1, 2):
        yield from (Run(setup, lr, seed) for setup, lr in pairs)
    yield from (Run(setup, factor * lr) for setup, lr in pairs for factor in (0.5, 2.0))


def results(folder: Path) -> list[dict[str, Any]]:
    """Read all records, in the form of evidence/runs.py."""
    return of_gain(folder).records


def best(done: list[dict[str, Any]], setup: str) -> tuple[float, float]:
    """The learning rate and final loss of a setup's best whole run with seed 0."""
    mine = [r for r in done if r["setup"] == setup and r["seed"] == 0 and r["part"] == 1]
    losses = [(final(r) if math.isfinite(final(r)) else math.inf, r["lr"]) for r in mine]
    loss, lr = min(losses, default=(math.inf, math.nan))
    return lr, loss


def final(run: dict[str, Any]) -> float:
    """The last loss, or infinity if the run diverged."""
    return math.inf if run.get("diverged") else run["validation"]["loss"][-1]
