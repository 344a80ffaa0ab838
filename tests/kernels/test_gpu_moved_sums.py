"""The norm of an update, whose moments are stored while it is summed up: the same step as in two full readings."""

from __future__ import annotations

import pytest
import torch
from gpu_support import (
    F32,
    assert_equal_items,
    assert_same_step,
    assert_same_sums,
    copied,
    few_samples,
    made,
    missing_brackets,
    reference,
    short_lists,
)
from step_cases import RULES, SELECTIONS

from selective.kernels import Decay, Draw, Item, Selection, Strength, selective_step
from selective.kernels.gpu import batch

# The multiplier is the cap, so it does not depend on how the sums are rounded: their blocks are of another size.
CAPPED = Strength("norm_preserving", rest=0.25, cap=1.01)
SIZES = (40, 2500)  # a part of a block, and an odd number of blocks


def items_of(rule: str, device: str, numels: tuple[int, ...] = SIZES) -> list[Item]:
    return [copied(made(RULES[rule], (n,), (F32, F32, F32), seed=1, address=n), device) for n in numels]


def steps(items: list[Item], rule: str, selection: Selection, strength: Strength, decay: Decay | None = None):
    """Two steps: of their sums, those of the second, in which a previous momentum has been written."""
    for number in range(2):
        sums = selective_step(items, rule=RULES[rule], selection=selection, strength=strength, draw=Draw(7, number),
                              statistics=True, decay=decay, backend="gpu")  # fmt: skip
    return sums


@pytest.mark.parametrize(
    "rule, selection, decay",
    [
        ("adamw", "update", None),
        ("adamw", "top_update", None),
        pytest.param("adamw", "previous", Decay(of="gradient"), marks=pytest.mark.slow),
        pytest.param("adamw", "element", Decay(of="masked"), marks=pytest.mark.slow),
        pytest.param("adam_coupled", "momentum", None, marks=pytest.mark.slow),
        pytest.param("adam_amsgrad_maximize", "update_loose", None, marks=pytest.mark.slow),
        pytest.param("adamw", "top_sampled", None, marks=pytest.mark.slow),
    ],
)
def test_the_step_has_the_same_bits(rule, selection, decay, device, monkeypatch) -> None:
    few_samples(monkeypatch)
    results = []
    for moves in (True, False):
        monkeypatch.setattr(batch, "MOVE_WITH_SUMS", moves)
        items = items_of(rule, device)
        sums = steps(items, rule, SELECTIONS[selection], CAPPED, decay)
        results.append((items, sums))
    (moved, moved_sums), (plain, plain_sums) = results
    assert_equal_items(moved, plain)
    for ours, theirs in zip(moved_sums, plain_sums, strict=True):
        assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize("trouble", [missing_brackets, short_lists])
def test_what_a_repair_marks_and_adds_up_has_the_same_bits(trouble, device, monkeypatch) -> None:
    """Many equal scores, of which some are selected; and NaN."""
    few_samples(monkeypatch)
    trouble(monkeypatch)
    results = []
    for moves in (True, False):
        monkeypatch.setattr(batch, "MOVE_WITH_SUMS", moves)
        items = items_of("adamw", device)
        for item in items:
            item.grad[::3], item.grad[1::97] = 0, torch.nan
        results.append((items, list(steps(items, "adamw", SELECTIONS["top_update"], CAPPED))))
    for moved, plain in zip(results[0][0], results[1][0], strict=True):
        for ours, theirs in ((moved.param, plain.param), *((moved.state[k], plain.state[k]) for k in plain.state)):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert [s.selected for s in results[0][1]] == [s.selected for s in results[1][1]]


def test_a_view_that_is_not_aligned_is_stepped_by_the_same_bits(device) -> None:
    """Its blocks take masked loads, and its last one is cut off."""
    items = items_of("adamw", device, (2500,))
    shifted = copied(items[0])
    for name in ("exp_avg", "exp_avg_sq"):
        memory = torch.zeros(2501, device=device)
        memory[1:] = shifted.state[name]
        shifted.state[name] = memory[1:]
    for these in (items, [shifted]):
        steps(these, "adamw", SELECTIONS["update"], CAPPED)
    assert_equal_items(items, [shifted])


def test_the_multiplier_is_that_of_the_sums(device, monkeypatch) -> None:
    """Without a cap that binds: against the reference."""
    few_samples(monkeypatch)
    for selection in ("update", "top_update"):
        start = made(RULES["adamw"], (3001,), seed=1)
        how = {"selection": SELECTIONS[selection], "strength": Strength("norm_preserving", rest=0.5, cap=9.0)}
        item = copied(start, device)
        (sums,) = selective_step([item], rule=RULES["adamw"], draw=Draw(7, 3), statistics=True, backend="gpu", **how)
        twin, wanted = reference(start, RULES["adamw"], **how)
        assert_same_step(start, item, twin)
        assert_same_sums(sums, wanted)


def test_moments_of_16_bits_and_other_norms_are_read_twice(device, monkeypatch) -> None:
    """The update can't be formed from rounded moments, and the norm of a momentum needs no second moment."""
    moves: list[bool] = []
    really = batch.moves_with_sums

    def noted(cfg):
        moves.append(really(cfg))
        return moves[-1]

    monkeypatch.setattr(batch, "moves_with_sums", noted)
    for dtype, of in ((F32, "update"), (torch.bfloat16, "update"), (F32, "momentum")):
        items = [copied(made(RULES["adamw"], (40,), (F32, F32, dtype), seed=1), device)]
        selective_step(items, rule=RULES["adamw"], selection=SELECTIONS["update"], draw=Draw(0, 0),
                       strength=Strength("norm_preserving", of=of), backend="gpu")  # fmt: skip
    assert moves == [True, False, False]


@pytest.mark.gpu
@pytest.mark.parametrize("selection", ["update", "top_update"])
@pytest.mark.parametrize("rule", ["adamw", "adam_amsgrad_maximize"])
def test_a_large_tensor_has_the_same_bits(rule, selection, device, monkeypatch) -> None:
    """Compiled: three million elements, and a list of them that begins and ends in the middle of a block."""
    results = []
    for moves in (True, False):
        monkeypatch.setattr(batch, "MOVE_WITH_SUMS", moves)
        items = items_of(rule, device, (3_000_001, 700, 100_000))
        results.append((items, list(steps(items, rule, SELECTIONS[selection], CAPPED))))
    assert_equal_items(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
