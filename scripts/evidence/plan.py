"""The plan: which runs are wanted, in the order in which they are made, in stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from evidence.ranking import best_setups
from evidence.runs import Results, Run
from evidence.setups import POLICIES, READINGS, control_of, unmasked
from evidence.sweeps import (
    MORE_SEEDS,
    Start,
    all_seeds,
    chosen,
    control,
    joint_sweep,
    rest_sweep,
    screened,
    seeds,
    settled,
    start_around,
    start_of,
    sweep,
    swept_control,
)

# The shares of the steps that the baseline gets, and the best composition, in the comparison of whole schedules
LONGER, SHORTER = 1.5, 0.5
HOME = "python-34m"  # the task on which the setups of all others are chosen
Plan = Callable[[Results], Iterator[Run]]

# Stage 2. The first ones are also tried with a rate of its own for what is no inner matrix.
APART = ("AdamW", "AdamW in Soap", "Cautious on AdamW in Soap")
DECAYS = ("CautiousDecay on AdamW in Soap", "Cautious, CautiousDecay on AdamW in Soap")
RIVALS = ("pytorch_optimizer SOAP", "AdamW in the momentum's basis", "AdamW in AdaDiag++")
NORMS = tuple(f"{name}, norm controlled" for name in APART)
MORE_NORMS = tuple(f"{name} on AdamW in Soap, norm controlled" for name in ("AlphaConsistency", "MGUP mild"))
AVERAGED = "Cautious on AdamW in Soap, tail averaged"
# At the best rates of another setup, with all seeds; and with one, unless that ends below the other setup's
AVERAGED_BEST, OUR_MUON = f"{NORMS[-1]}, tail averaged", "Muon, by our kernels"
AT_ITS_BEST = {AVERAGED: APART[-1], AVERAGED_BEST: NORMS[-1], OUR_MUON: "Muon"}
SCREENED = {
    f"{NORMS[-1]}, refreshed every 3": NORMS[-1],
    "Cautious on NAdam in Soap, norm controlled": NORMS[-1],
    "AdamW, the betas of Soap": "AdamW",
}
# Stage 3
MUON_MASKS = tuple(f"{name} on Muon" for name in ("Cautious", "MGUP mild", "MGUP official"))
MUON_MORE = ("Muon, whitened", "Muon, Cautious before the orthogonalisation", "Muon, Cautious by rows")
MUON_NORMS = ("Muon, norm controlled", "Muon, whitened, norm controlled")
# Stages 4 and 5: AdamW, Muon, and the best two of these with three seeds at 34M, one of a family at most. An average
# over the end of a run can be put around any of them, so it is no candidate of its own. A masked one brings the same
# without a mask, and its control, at its best rates.
CANDIDATES = (
    *((setup,) for setup in (*APART[1:], *DECAYS, *RIVALS[1:], *NORMS[:-1], *MUON_MASKS)),
    (NORMS[-1], *MORE_NORMS),
    MUON_MORE,
)
# Stage 6, besides `READINGS` and `MUON_NORMS`: two masks alone with two rates, and MGUP's own setting, which has one
# rate for all bases
ALONE_APART = tuple(f"{name} on AdamW" for name in ("AlphaConsistency", "Cautious"))
THEIR_RATE, THEIR_STEPS = 3e-4, 2000 / 600
THEIRS = tuple(setup for base in ("AdamW", "Lion", "Muon") for setup in (base, f"MGUP official on {base}"))
# Stage 7: fine-tuning, and pictures
FINE = Start((2.5e-5, 5e-5, 1e-4, 2e-4))
MASKED = tuple(f"{name} on AdamW" for name in POLICIES)
FINE_TUNED = ("AdamW", *MASKED, *APART[1:])


def masks(results: Results, task: str, base: str, policies: Sequence[str]) -> Iterator[Run]:
    """A base bare and with each policy: sweeps, seeds at the best rates, then the same of the controls."""
    masked = [f"{name} on {base}" for name in policies]
    for setup in (base, *masked):
        yield from sweep(results, task, setup)
    for setup in (base, *masked):
        yield from seeds(results, task, setup)
    yield from seeds(results, task, base, part=LONGER)
    for setup in masked:
        yield from swept_control(results, task, setup)


def of_each(
    results: Results,
    task: str,
    setups: Sequence[str],
    apart: bool = False,
    begin: Callable[[str], Start | None] = start_of,
) -> Iterator[Run]:
    """The sweeps of some setups, then their seeds.

    With `apart`, both rates are swept on until the best pair has worse ones on all sides. `begin` says where the sweep
    of a setup begins. None: that is not known yet.
    """
    starts = {setup: start for setup in setups if (start := begin(setup)) is not None}
    for setup, start in starts.items():
        yield from sweep(results, task, setup, start)
    if apart:
        for part in (rest_sweep, joint_sweep):
            for setup, start in starts.items():
                yield from part(results, task, setup, start)
    for setup, start in starts.items():
        yield from seeds(results, task, setup, start, apart=apart)


def stage_1(results: Results) -> Iterator[Run]:
    """34M on Python source: AdamW and Lion, bare and with each mask, and the controls."""
    for base in ("AdamW", "Lion"):
        yield from masks(results, "python-34m", base, list(POLICIES))


def stage_2(results: Results) -> Iterator[Run]:
    """34M on Python source: the best composition."""
    task = HOME
    yield from of_each(results, task, APART)
    yield from of_each(results, task, APART, apart=True)
    yield from seeds(results, task, APART[0], part=LONGER, apart=True)
    yield from of_each(results, task, DECAYS)
    yield from _at_its_best(results, AVERAGED)
    yield from of_each(results, task, RIVALS)
    yield from of_each(results, task, RIVALS[:1], apart=True)
    yield from swept_control(results, task, APART[-1])
    yield from control(results, task, DECAYS[0])
    yield from of_each(results, task, NORMS, apart=True)
    yield from seeds(results, task, NORMS[-1], part=SHORTER, apart=True)
    yield from of_each(results, task, MORE_NORMS, apart=True)
    yield from swept_control(results, task, NORMS[-1])
    yield from _at_its_best(results, AVERAGED_BEST)
    for setup, rival in SCREENED.items():
        if (point := chosen(results, task, rival)) is not None:
            yield from screened(results, task, setup, rival, point)


def _at_its_best(results: Results, setup: str) -> Iterator[Run]:
    """A setup at the rates that were best for another one, or at its best one rate for all."""
    rival = AT_ITS_BEST[setup]
    if setup != AVERAGED:
        point = chosen(results, HOME, rival)
    elif (lr := settled(results, HOME, rival)) is not None:
        point = lr, None
    else:
        point = None
    if point is not None:
        yield from all_seeds(HOME, setup, point)


def stage_3(results: Results) -> Iterator[Run]:
    """34M on Python source: Muon with its auxiliary AdamW's rate swept, bare, masked, and whitened."""
    task = HOME
    yield from of_each(results, task, ["Muon"], apart=True)
    yield from _at_its_best(results, OUR_MUON)
    yield from of_each(results, task, MUON_MASKS, apart=True)
    yield from of_each(results, task, MUON_MORE, apart=True)
    yield from swept_control(results, task, MUON_MASKS[0])


def stage_4(results: Results) -> Iterator[Run]:
    """110M on Python source: AdamW, Muon and the two setups that were best at 34M."""
    yield from _short_list(results, "python-110m")


def stage_5(results: Results) -> Iterator[Run]:
    """English text, the same short list, at 34M and at 110M."""
    yield from _short_list(results, "english-34m")
    yield from _short_list(results, "english-110m")


def stage_6(results: Results) -> Iterator[Run]:
    """MGUP's own setting with one seed, other readings, masks alone with two rates, and norm control on Muon."""
    yield from (Run("english-34m-256", setup, THEIR_RATE, rest_lr=_rest(setup), part=THEIR_STEPS) for setup in THEIRS)
    yield from of_each(results, HOME, [f"{name} on AdamW" for name in READINGS])
    yield from of_each(results, HOME, ALONE_APART, apart=True)
    yield from of_each(results, HOME, MUON_NORMS, apart=True)


def stage_7(results: Results) -> Iterator[Run]:
    """Fine-tuning of MiniLM, with five seeds, and a masked autoencoder of pictures."""
    task = "foldoc-minilm"
    for setup in FINE_TUNED:
        yield from sweep(results, task, setup, FINE)
    for setup in FINE_TUNED:
        yield from seeds(results, task, setup, FINE, which=MORE_SEEDS)
    for setup in MASKED:
        yield from control(results, task, setup, FINE, MORE_SEEDS)
    task = "pictures-mae"
    yield from masks(results, task, "AdamW", list(POLICIES))
    yield from of_each(results, task, APART[1:])
    yield from of_each(results, task, ["Muon"], apart=True)


def _rest(setup: str) -> float | None:
    return THEIR_RATE if "Muon" in setup else None


def _short_list(results: Results, task: str) -> Iterator[Run]:
    """Both rates of everyone, one setup after the other, so that those that are done have all that their rows need.

    Sweeps begin at the rates that were best at 34M on Python source. A masked setup's control, and the same without a
    mask, have its rates.
    """
    begin = partial(start_around, results, HOME)
    rivals = ["Muon", *best_setups(results, HOME, CANDIDATES, 2)]
    for setup in ("AdamW", *sorted(rivals, key=lambda setup: not beside(setup))):  # masked ones come first
        yield from of_each(results, task, [setup], apart=True, begin=begin)
        start = begin(setup)
        point = None if start is None else chosen(results, task, setup, start)
        if point is not None:
            for other in beside(setup):
                yield from all_seeds(task, other, point)
        if setup == "AdamW":
            yield from seeds(results, task, setup, start, LONGER, apart=True)


def beside(setup: str) -> list[str]:
    """The setups with which a masked one is compared at its own rates: the same without a mask, and its control."""
    bare = unmasked(setup)
    return [] if bare is None else [bare, control_of(setup)]


STAGES: dict[int, Plan] = {1: stage_1, 2: stage_2, 3: stage_3, 4: stage_4, 5: stage_5, 6: stage_6, 7: stage_7}


def wanted(results: Results, stages: Sequence[int]) -> list[Run]:
    """The runs of some stages, each once. Runs that depend on results are among them once those are there."""
    return list(dict.fromkeys(run for stage in stages for run in STAGES[stage](results)))
