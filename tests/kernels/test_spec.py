"""The facts that stand on the plain data: every device asks them there, so they have to be those of the definition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from selective.kernels import (
    AdamRule,
    Advanced,
    Draw,
    GivenRule,
    Item,
    LionRule,
    Rule,
    Selection,
    SGDRule,
    Strength,
    advance,
    decay_factor,
)
from selective.kernels.reference.selections import select
from selective.kernels.reference.strengths import strength_of

NAMES = {"grad", "update", "momentum", "previous_momentum"}
SELECTIONS = [
    Selection("everything"),
    *(Selection("agreement", product=x) for x in ("update", "momentum", "previous_momentum")),  # type: ignore[arg-type]
    *(Selection("top_k", score=x) for x in ("update", "momentum", "nesterov")),  # type: ignore[arg-type]
    Selection("bernoulli"),
]
STRENGTHS = [
    Strength("fixed", 2.0),
    Strength("mean_preserving"),
    *(Strength("norm_preserving", of=x) for x in ("update", "momentum", "gradient")),  # type: ignore[arg-type]
    Strength("alignment"),
]
RULES: list[Rule] = [
    AdamRule(1e-2, 0.9, 0.99, 1e-8, weight_decay=0.1),
    AdamRule(1e-2, 0.9, 0.99, 1e-8, weight_decay=0.1, decoupled=False, amsgrad=True),
    SGDRule(0.1, 0.9, weight_decay=0.1),
    SGDRule(0.1),
    LionRule(1e-2, 0.9, 0.99, weight_decay=0.1),
    GivenRule(),
]
RULE, DRAW = RULES[0], Draw(1, 2)


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(40, generator=generator) for name in sorted(NAMES)}


def item() -> Item:
    return Item(torch.zeros(40), torch.zeros(40), {}, 0)


def selected(selection: Selection, values: dict[str, Tensor]) -> list[float]:
    return select(selection, item(), RULE, Advanced(**values), DRAW).float().tolist()


def multipliers(strength: Strength, values: dict[str, Tensor]) -> list[float]:
    first, second, _ = strength_of(strength, torch.arange(40) < 20, item(), Advanced(**values), DRAW)
    return [float(first), float(second)]


@pytest.mark.parametrize(
    "part", [*SELECTIONS, *STRENGTHS], ids=lambda part: f"{part.kind}-{'-'.join(sorted(part.reads))}"
)
def test_a_selection_or_strength_reads_what_it_says(part: Any) -> None:
    """Other numbers change the result where they are read, and nothing where they are not."""
    outcome: Any = selected if isinstance(part, Selection) else multipliers
    before, other = outcome(part, tensors()), torch.randn(40, generator=torch.Generator().manual_seed(9))
    for name in NAMES:
        if name in part.reads:
            assert outcome(part, tensors() | {name: other}) != before, name
        else:
            assert outcome(part, tensors() | {name: torch.full_like(other, torch.nan)}) == before, name


def test_a_strength_reads_more_where_coordinates_stand_still() -> None:
    assert Strength("fixed", still=True).reads == {"grad", "update"}


def test_a_function_reads_the_momentum_where_it_says_so() -> None:
    assert Selection("function").reads == {"grad", "update"}
    assert Selection("function", reads_momentum=True).reads == {"grad", "update", "momentum"}


@pytest.mark.parametrize(
    ("fraction", "numel", "k"), [(0.5, 7, 3), (0.29, 100, 28), (0.3, 3, 0), (1.0, 5, 5), (0.5, 0, 0)]
)
def test_k_is_rounded_down_in_float64(fraction: float, numel: int, k: int) -> None:
    selection = Selection("top_k", fraction=fraction)
    assert selection.k_of(numel) == k
    assert selection.leaves_dense(numel) == (k == 0)
    assert not replace(selection, kind="agreement").leaves_dense(numel)


class Noting(dict[str, Any]):
    """A state that notes which of its entries are looked at."""

    def __init__(self, entries: dict[str, Any]) -> None:
        super().__init__(entries)
        self.seen: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.seen.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.seen.add(name)
        return super().get(name, default)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{type(rule).__name__}-{len(rule.state_names)}")
def test_a_rule_has_the_state_that_it_says(rule: Rule) -> None:
    names = [*rule.state_names, *(["step"] if rule.counts_steps else [])]
    values = {name: torch.tensor(3.0) if name == "step" else torch.full((5,), 0.5) for name in names}
    state = Noting(values)
    before = None if rule.previous_momentum is None else values[rule.previous_momentum].clone()
    moved = advance(Item(torch.ones(5), torch.ones(5), state, 0), rule, keep_previous=True)
    assert state.seen == set(names) - {"start"}  # which is read where the parameter is written
    assert (moved.momentum is None) == (rule.first_moment is None)
    if rule.first_moment is not None:
        assert moved.momentum is not None and before is not None and moved.previous_momentum is not None
        torch.testing.assert_close(moved.momentum, state[rule.first_moment])
        torch.testing.assert_close(moved.previous_momentum, before)
    assert ("step" in names) == (rule.counts_steps and float(state["step"]) == 4)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{type(rule).__name__}-{len(rule.state_names)}")
def test_a_rule_decays_as_it_says(rule: Rule) -> None:
    decay = getattr(rule, "weight_decay", 0.0)
    assert rule.coupled_decay == (decay if rule.decay_is_coupled else 0.0)
    assert rule.has_decay_factor or decay_factor(rule) == 1.0
