"""The public suite once more, with a preconditioner on: it refreshes, staggered, and rotates what it can."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import optimi
import pytest
import pytorch_optimizer
import torch
from older_torch import faults_of_older_torch
from torchao.optim import AdamW8bit
from transforms import Turning

from selective import MGUP, Cautious, Dense, Policy, SelectiveUpdate
from selective.testing import Subject, check_wrapper, conformance_checks


class RotatedHalf(Policy):
    """Code of its own, with state."""

    def init_state(self, view: Any) -> Any:
        return {"last": torch.zeros(view.shape)}

    def mask(self, view: Any) -> Any:
        agree = (view.update * view.grad > 0).float()
        return 0.5 + 0.4 * agree + 0.1 * view.state["last"], {"last": agree}


POLICIES: dict[str, Policy] = {
    "dense": Dense(),
    "mgup": MGUP(),
    "mgup-momentum": MGUP(score="momentum"),
    "cautious": Cautious(),
    "custom": RotatedHalf(),
}
BASES: dict[str, Any] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01, weight_decay=0.01, amsgrad=True),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01),
    "adamw-fused": lambda ps: torch.optim.AdamW(ps, lr=0.01, fused=True),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=0.01),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=0.01),
    "lion": lambda ps: pytorch_optimizer.Lion(ps, lr=0.001),
    "optimi-adamw": lambda ps: optimi.AdamW(ps, lr=0.01),
    "torchao-8bit": lambda ps: AdamW8bit(ps, lr=0.01),
}
SLOW_POLICIES = ("mgup", "cautious", "dense")
CROSS: list[Any] = [("adamw", policy) for policy in POLICIES if policy not in SLOW_POLICIES]
CROSS += [pytest.param("adamw", policy, marks=pytest.mark.slow) for policy in SLOW_POLICIES]
# They step by the same code as another one here, or carry their moments by it.
TWICE = ("adamw-fused", "adam", "optimi-adamw", "sgd", "lion", "torchao-8bit")
CROSS += [(base, "mgup-momentum") for base in BASES if base not in ("adamw", *TWICE)]
CROSS += [pytest.param(base, "mgup-momentum", marks=pytest.mark.slow) for base in TWICE]
CROSS += [pytest.param(base, "dense", marks=pytest.mark.slow) for base in BASES if base != "adamw"]
FAULTS_OF_BASES = {
    # A copy of it can't step by itself, which it does for what is not rotated in a dense group.
    "lion dense": {"copies_step_as_the_original"},
    "optimi-adamw": {"flattened_checkpoint_round_trip", "unstepped_flattened_checkpoint"},
    "torchao-8bit": {"copies_step_as_the_original"},
}
NO_CONFIG = {"configs_are_validated"}  # asked of the policies elsewhere
OTHER_STEP = "it compares with the base's own step, and a rotated base takes another one"
WAIVES = {
    "compensation_stays_within_its_cap": OTHER_STEP,
    "nothing_aligned_stays_finite": OTHER_STEP,
    "inexact_moments_are_understood": "a moment that nobody can read is not carried: docs/guides/rotate.md says so",
}


def subject(base: str, policy: str, **options: Any) -> Subject:
    beta = 0.9 if base == "adafactor" else None
    options = {"preconditioner": Turning(every=2), "matrix_view": "experts", **options}
    return Subject(
        name=f"rotated {policy} over {base}",
        base=BASES[base],
        wrap=lambda optimizer: SelectiveUpdate(optimizer, policy=POLICIES[policy], momentum_beta=beta, **options),
        waives=WAIVES,
        # Two bases and two statistics, the momentum that no other is there for, the state of `last`.
        copies=4 + (base == "adafactor" and policy != "dense") + (policy == "custom"),
        strict=True,
    )


@pytest.fixture(autouse=True)
def _small_and_eager():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):
        yield
    torch.set_num_threads(threads)


def check(one: Subject, base: str) -> None:
    report = check_wrapper(one)
    report.raise_if_failed()
    expected = FAULTS_OF_BASES.get(base, set()) | NO_CONFIG | set(one.waives)
    found = {o.check for o in report.not_applicable} - faults_of_older_torch(base)  # some have them: 2.11, not 2.9
    assert found == expected, str(report)
    assert len(report.outcomes) == len(conformance_checks)


@pytest.mark.parametrize(("base", "policy"), CROSS, ids=lambda name: name)
def test_conformance(base: str, policy: str) -> None:
    check(subject(base, policy), f"{base} {policy}" if base == "lion" else base)


EVERY_CAPTURE = ("adamw", "nadam", "adafactor")
WAITING = {**WAIVES, "base_state_is_left_to_the_base": "after a step the base has made nothing yet of what stood still"}


def test_conformance_with_both_of_these() -> None:
    """A mask in the original space, and a first step that only makes bases: each by itself is slow."""
    both = subject("adamw", "mgup", mask_space="original", preconditioner=Turning(every=2, waits=True))
    check(replace(both, waives=WAITING), "adamw")


@pytest.mark.slow
@pytest.mark.parametrize("base", EVERY_CAPTURE)
def test_conformance_with_the_mask_in_the_original_space(base: str) -> None:
    check(subject(base, "mgup", mask_space="original"), base)


@pytest.mark.slow
@pytest.mark.parametrize("base", EVERY_CAPTURE)
def test_conformance_with_a_first_step_that_only_makes_bases(base: str) -> None:
    waiting = subject(base, "dense", preconditioner=Turning(every=2, waits=True))
    check(replace(waiting, waives=WAITING), base)


def test_an_8_bit_moment_is_carried_as_an_exact_one_is() -> None:
    """Quantisation moves a step's cosine to 0.97 or so; a moment that was not carried would show."""

    def steps(base: str, preconditioner: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        p = torch.nn.Parameter(torch.randn(64, 64, generator=generator))
        drift = torch.randn(64, 64, generator=generator)
        optimizer = SelectiveUpdate(BASES[base]([p]), preconditioner=preconditioner)
        moved = []
        for _ in range(8):
            before = p.detach().clone()
            p.grad = drift + torch.randn(64, 64, generator=generator)
            optimizer.step()
            moved.append(p.detach() - before)
        return torch.stack(moved[3:]).flatten()

    def cosine(preconditioner: Any) -> float:
        found, expected = steps("torchao-8bit", preconditioner), steps("adamw", Turning(every=2))
        return float(torch.nn.functional.cosine_similarity(found, expected, dim=0))

    assert cosine(Turning(every=2)) >= 0.95
    assert cosine(Uncarried(every=2)) < 0.9


class Uncarried(Turning):
    def refresh(self, states, grads):
        return [None for _ in super().refresh(states, grads)]
