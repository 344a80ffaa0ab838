"""The plan: which runs are wanted, in the order in which they are made, in stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from evidence.ranking import best_setups
from evidence.runs import Results, Run
from evidence.setups import POLICIES, READINGS
from evidence.sweeps import (
    MORE_SEEDS,
    SEEDS,
    Start,
    control,
    joint_settled,
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
# At the best rates of the last of `NORMS`, which also gets half of the steps. Those that end above it at seed 0 get no
# other seed, except for the average.
VARIANTS = (
    f"{NORMS[-1]}, tail averaged",
    f"{NORMS[-1]}, refreshed every 3",
    "Cautious on NAdam in Soap, norm controlled",
)
# Stage 3
MUON_MASKS = tuple(f"{name} on Muon" for name in ("Cautious", "MGUP mild", "MGUP official"))
MUON_MORE = ("Muon, whitened", "Muon, Cautious before the orthogonalisation", "Muon, Cautious by rows")
MUON_NORMS = ("Muon, norm controlled", "Muon, whitened, norm controlled")
OUR_MUON = "Muon, by our kernels"  # at the best rates of the first
# Stages 4 and 5: AdamW, Muon, and the best two of these with three seeds at 34M, one of a family at most. An average
# over the end of a run can be put around any of them, so it is no candidate of its own.
CANDIDATES = (
    *((setup,) for setup in (*APART[1:], *DECAYS, *RIVALS[1:], *NORMS[:-1], *MUON_MASKS)),
    (NORMS[-1], *MORE_NORMS, *VARIANTS[1:]),
    (*MUON_MORE, *MUON_NORMS),
)
# Stage 6, besides `READINGS` and `MUON_NORMS`: MGUP's own setting, which has one rate for all bases
THEIR_RATE, THEIR_STEPS = 3e-4, 2000 / 600
THEIRS = tuple(setup for base in ("AdamW", "Lion", "Muon") for setup in (base, f"MGUP official on {base}"))
# Stage 7: fine-tuning, and pictures
FINE = Start((2.5e-5, 5e-5, 1e-4, 2e-4))
MASKED = tuple(f"{name} on AdamW" for name in POLICIES)
FINE_TUNED = ("AdamW", *MASKED, *APART[1:])


def masks(results: Results, task: str, base: str, policies: Sequence[str]) -> Iterator[Run]:
    """A base bare and with each policy: sweeps, seeds at the best rates, then the same of the controls.

    A control has two rates at first. Its sweep goes on to the rates beside its best at the end, when everything else
    is done, and its seeds are at the best of those that it has.
    """
    masked = [f"{name} on {base}" for name in policies]
    for setup in (base, *masked):
        yield from sweep(results, task, setup)
    for setup in (base, *masked):
        yield from seeds(results, task, setup)
    yield from seeds(results, task, base, part=LONGER)
    for setup in masked:
        yield from control(results, task, setup)
    for setup in masked:
        yield from swept_control(results, task, setup)


def of_each(
    results: Results,
    task: str,
    setups: Sequence[str],
    apart: bool = False,
    begin: Callable[[str], Start | None] = start_of,
    joint: bool = False,
) -> Iterator[Run]:
    """The sweeps of some setups, then their seeds; with `apart` also the sweeps over the other rate.

    `begin` says where the sweep of a setup begins. None: that is not known yet. With `joint`, both rates are swept on
    until the best pair has worse ones on all sides.
    """
    starts = {setup: start for setup in setups if (start := begin(setup)) is not None}
    for setup, start in starts.items():
        yield from sweep(results, task, setup, start)
    if apart:
        for setup, start in starts.items():
            yield from rest_sweep(results, task, setup, start)
    if joint:
        for setup, start in starts.items():
            yield from joint_sweep(results, task, setup, start)
    for setup, start in starts.items():
        yield from seeds(results, task, setup, start, apart=apart, joint=joint)


def stage_1(results: Results) -> Iterator[Run]:
    """34M on Python source: AdamW and Lion, bare and with each mask, and the controls."""
    for base in ("AdamW", "Lion"):
        yield from masks(results, "python-34m", base, list(POLICIES))


def stage_2(results: Results) -> Iterator[Run]:
    """34M on Python source: the best composition."""
    task = HOME
    yield from of_each(results, task, APART)
    yield from of_each(results, task, APART, apart=True)
    yield from of_each(results, task, APART[:1], apart=True, joint=True)
    yield from seeds(results, task, APART[0], part=LONGER, apart=True, joint=True)
    yield from of_each(results, task, DECAYS)
    lr = settled(results, task, APART[-1])
    if lr is not None:  # an average changes no step, so that the best rate stays the best
        yield from (Run(task, AVERAGED, lr, seed) for seed in SEEDS)
    yield from of_each(results, task, RIVALS)
    yield from of_each(results, task, RIVALS[:1], apart=True)
    yield from control(results, task, APART[-1])
    yield from control(results, task, DECAYS[0])
    yield from of_each(results, task, NORMS, apart=True)
    yield from of_each(results, task, NORMS[-1:], apart=True, joint=True)
    yield from control(results, task, NORMS[-1])
    yield from swept_control(results, task, APART[-1])
    point = joint_settled(results, task, NORMS[-1])
    if point is not None:
        yield from seeds(results, task, NORMS[-1], part=SHORTER, apart=True, joint=True)
        yield from (Run(task, VARIANTS[0], point[0], seed, point[1]) for seed in SEEDS)
        for setup in VARIANTS[1:]:
            yield from screened(results, task, setup, NORMS[-1], point)
    yield from swept_control(results, task, NORMS[-1])
    yield from of_each(results, task, MORE_NORMS, apart=True)


def stage_3(results: Results) -> Iterator[Run]:
    """34M on Python source: Muon with its auxiliary AdamW's rate swept, bare, masked, and whitened."""
    task = HOME
    yield from of_each(results, task, ["Muon"], apart=True)
    yield from of_each(results, task, ["Muon"], apart=True, joint=True)
    if (point := joint_settled(results, task, "Muon")) is not None:
        yield from (Run(task, OUR_MUON, point[0], seed, point[1]) for seed in SEEDS)
    yield from of_each(results, task, MUON_MASKS, apart=True)
    yield from of_each(results, task, MUON_MORE, apart=True)
    yield from control(results, task, MUON_MASKS[0])
    yield from swept_control(results, task, MUON_MASKS[0])


def stage_4(results: Results) -> Iterator[Run]:
    """110M on Python source: AdamW, Muon and the two setups that were best at 34M."""
    yield from _short_list(results, "python-110m")


def stage_5(results: Results) -> Iterator[Run]:
    """English text, the same short list, at 34M and at 110M."""
    yield from _short_list(results, "english-34m")
    yield from _short_list(results, "english-110m")


def stage_6(results: Results) -> Iterator[Run]:
    """MGUP's own setting with one seed, other readings of AlphaAdam, Magma, and norm control on Muon."""
    yield from (Run("english-34m-256", setup, THEIR_RATE, rest_lr=_rest(setup), part=THEIR_STEPS) for setup in THEIRS)
    yield from of_each(results, HOME, [f"{name} on AdamW" for name in READINGS])
    yield from of_each(results, HOME, MUON_NORMS, apart=True)


def stage_7(results: Results) -> Iterator[Run]:
    """Fine-tuning of MiniLM, with five seeds, and a masked autoencoder of pictures."""
    task = "foldoc-minilm"
    for setup in FINE_TUNED:
        yield from sweep(results, task, setup, FINE)
    for setup in FINE_TUNED:
        yield from seeds(results, task, setup, FINE, all_seeds=MORE_SEEDS)
    for setup in MASKED:
        yield from control(results, task, setup, FINE, MORE_SEEDS)
    task = "pictures-mae"
    yield from masks(results, task, "AdamW", list(POLICIES))
    yield from of_each(results, task, APART[1:])
    yield from of_each(results, task, ["Muon"], apart=True)


def _rest(setup: str) -> float | None:
    return THEIR_RATE if "Muon" in setup else None


def _short_list(results: Results, task: str) -> Iterator[Run]:
    """Both rates of everyone. Sweeps but AdamW's begin at the rates that were best at 34M on Python source."""
    yield from of_each(results, task, ["AdamW"], apart=True, joint=True)
    rivals = ["Muon", *best_setups(results, HOME, CANDIDATES, 2)]
    yield from of_each(results, task, rivals, apart=True, begin=partial(start_around, results, HOME), joint=True)
    yield from seeds(results, task, "AdamW", part=LONGER, apart=True, joint=True)


STAGES: dict[int, Plan] = {1: stage_1, 2: stage_2, 3: stage_3, 4: stage_4, 5: stage_5, 6: stage_6, 7: stage_7}


def wanted(results: Results, stages: Sequence[int]) -> list[Run]:
    """The runs of some stages, each once. Runs that depend on results are among them once those are there."""
    return list(dict.fromkeys(run for stage in stages for run in STAGES[stage](results)))
