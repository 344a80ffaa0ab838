"""The plan: which runs are wanted, in the order in which they are made, in stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from evidence.ranking import best_setups
from evidence.runs import Results, Run
from evidence.setups import POLICIES, READINGS
from evidence.sweeps import MORE_SEEDS, control, rest_sweep, seeds, settled, sweep, swept_control

LONGER = 1.5  # the share of the steps that the baseline gets in the comparison of whole schedules
Plan = Callable[[Results], Iterator[Run]]

# Stage 2. The first ones are also tried with a rate of its own for what is no inner matrix.
APART = ("AdamW", "AdamW in Soap", "Cautious on AdamW in Soap")
DECAYS = ("CautiousDecay on AdamW in Soap", "Cautious, CautiousDecay on AdamW in Soap")
RIVALS = ("pytorch_optimizer SOAP", "AdamW in the momentum's basis", "AdamW in AdaDiag++")
NORMS = tuple(f"{name}, norm controlled" for name in APART)
AVERAGED = "Cautious on AdamW in Soap, tail averaged"
# Stage 3
MUON_MASKS = tuple(f"{name} on Muon" for name in ("Cautious", "MGUP mild", "MGUP official"))
MUON_MORE = ("Muon, whitened", "Muon, Cautious before the orthogonalisation", "Muon, Cautious by rows")
# Stages 4 and 5: everyone of the first, and the best of the second with three seeds at 34M
BASELINES = ("AdamW", "Muon")
CANDIDATES = ("AdamW in Soap", *APART[2:], *DECAYS, *RIVALS[1:], *NORMS, AVERAGED, *MUON_MASKS, *MUON_MORE)
# Stage 6: MGUP's own setting, which has one rate for all bases
THEIR_RATE, THEIR_STEPS = 3e-4, 2000 / 600
THEIRS = tuple(setup for base in ("AdamW", "Lion", "Muon") for setup in (base, f"MGUP official on {base}"))
# Stage 7: fine-tuning, and pictures
FINE_GRID = (2.5e-5, 5e-5, 1e-4, 2e-4)
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


def of_each(results: Results, task: str, setups: Sequence[str], apart: bool = False) -> Iterator[Run]:
    """The sweeps of some setups, then their seeds; with `apart` also the sweeps over the other rate."""
    for setup in setups:
        yield from sweep(results, task, setup)
    if apart:
        for setup in setups:
            yield from rest_sweep(results, task, setup)
    for setup in setups:
        yield from seeds(results, task, setup, apart=apart)


def stage_1(results: Results) -> Iterator[Run]:
    """34M on Python source: AdamW and Lion, bare and with each mask, and the controls."""
    for base in ("AdamW", "Lion"):
        yield from masks(results, "python-34m", base, list(POLICIES))


def stage_2(results: Results) -> Iterator[Run]:
    """34M on Python source: the best composition."""
    task = "python-34m"
    yield from of_each(results, task, APART)
    yield from of_each(results, task, APART, apart=True)
    yield from of_each(results, task, DECAYS)
    lr = settled(results, task, "Cautious on AdamW in Soap")
    if lr is not None:  # an average changes no step, so that the best rate stays the best
        yield from (Run(task, AVERAGED, lr, seed) for seed in (0, 1, 2))
    yield from of_each(results, task, RIVALS)
    yield from control(results, task, "Cautious on AdamW in Soap")
    yield from control(results, task, DECAYS[0])
    yield from of_each(results, task, NORMS, apart=True)
    yield from control(results, task, NORMS[-1])
    yield from swept_control(results, task, APART[-1])


def stage_3(results: Results) -> Iterator[Run]:
    """34M on Python source: Muon with its auxiliary AdamW's rate swept, bare, masked, and whitened."""
    task = "python-34m"
    yield from of_each(results, task, ["Muon"], apart=True)
    yield from of_each(results, task, MUON_MASKS, apart=True)
    yield from of_each(results, task, MUON_MORE, apart=True)
    yield from control(results, task, MUON_MASKS[0])


def stage_4(results: Results) -> Iterator[Run]:
    """110M on Python source: AdamW, Muon and the two setups that were best at 34M."""
    yield from _short_list(results, "python-110m")


def stage_5(results: Results) -> Iterator[Run]:
    """English text, the same short list, at 34M and at 110M."""
    yield from _short_list(results, "english-34m")
    yield from _short_list(results, "english-110m")


def stage_6(results: Results) -> Iterator[Run]:
    """MGUP's own setting with one seed, other readings of AlphaAdam, and Magma."""
    yield from (Run("english-34m-256", setup, THEIR_RATE, rest_lr=_rest(setup), part=THEIR_STEPS) for setup in THEIRS)
    yield from of_each(results, "python-34m", [f"{name} on AdamW" for name in READINGS])


def stage_7(results: Results) -> Iterator[Run]:
    """Fine-tuning of MiniLM, with five seeds, and a masked autoencoder of pictures."""
    task = "foldoc-minilm"
    for setup in FINE_TUNED:
        yield from sweep(results, task, setup, FINE_GRID)
    for setup in FINE_TUNED:
        yield from seeds(results, task, setup, FINE_GRID, all_seeds=MORE_SEEDS)
    for setup in MASKED:
        yield from control(results, task, setup, FINE_GRID, MORE_SEEDS)
    task = "pictures-mae"
    yield from masks(results, task, "AdamW", list(POLICIES))
    yield from of_each(results, task, APART[1:])
    yield from of_each(results, task, ["Muon"], apart=True)


def _rest(setup: str) -> float | None:
    return THEIR_RATE if "Muon" in setup else None


def _short_list(results: Results, task: str) -> Iterator[Run]:
    yield from of_each(results, task, BASELINES[:1])
    yield from of_each(results, task, [*BASELINES[1:], *best_setups(results, "python-34m", CANDIDATES, 2)], apart=True)


STAGES: dict[int, Plan] = {1: stage_1, 2: stage_2, 3: stage_3, 4: stage_4, 5: stage_5, 6: stage_6, 7: stage_7}


def wanted(results: Results, stages: Sequence[int]) -> list[Run]:
    """The runs of some stages, each once. Runs that depend on results are among them once those are there."""
    return list(dict.fromkeys(run for stage in stages for run in STAGES[stage](results)))
