"""The sharded step's parts, on shards of one process: where elements lie, sums as integers, the K largest."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any

import pytest
import torch
from cut_up import cut, interleaved, parts, together
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from selective.kernels import (
    Draw,
    Item,
    Selection,
    SGDRule,
    Shard,
    Strength,
    begin_sharded,
    selective_step,
    top_k,
    uniform_bits,
)
from selective.kernels.reference.shard_indices import bits_at, cells, element_bits, flat_indices, local_places
from selective.kernels.sharded import ties
from selective.kernels.sharded import top_k as ranking
from selective.kernels.sharded.exact_sums import digits, number
from selective.kernels.sharded.own_code import value_of

CPU = torch.device("cpu")
WAYS = [(0, parts), (1, parts), (0, interleaved), (1, interleaved)]


@pytest.mark.parametrize("dim, how", WAYS)
@pytest.mark.parametrize("shape", [(7, 5), (2, 9, 3), (1, 4), (12, 8)])
def test_places(shape: tuple[int, ...], dim: int, how: Any) -> None:
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    seen, by_cell = [], []
    for part, shard in cut(whole, dim, 3, how):
        flat = part.reshape(-1)
        assert torch.equal(flat_indices(shard, CPU), flat)
        if shard.offset is not None and flat.numel():
            assert flat.tolist() == list(range(shard.offset, shard.offset + flat.numel()))
        places, here = local_places(shard, torch.arange(whole.numel()))
        assert torch.equal(torch.nonzero(here).view(-1), flat) and torch.equal(flat[places[here]], flat)
        seen.append(flat)
        by_cell += list(zip(cells(shard, CPU).tolist(), flat.tolist(), strict=True))
        assert torch.equal(element_bits(shard, Draw(1, 2), 3, CPU), uniform_bits(Draw(1, 2), 3, whole.numel())[flat])
    assert torch.equal(torch.cat(seen).sort().values, whole.view(-1))
    assert [index for _, index in sorted(by_cell)] == whole.view(-1).tolist(), "cells are in the whole's order"
    assert max(cell for cell, _ in by_cell) < shard.cells


@pytest.mark.parametrize("unit", ["element", "row", "tensor"])
@pytest.mark.parametrize("backend", ["reference", "cpu", "gpu"])
def test_random_masks_on_every_path(unit: Any, backend: Any) -> None:
    """The kernels of whole tensors draw a shard's numbers from its place on; columns go elsewhere, and are the same."""
    how: dict[str, Any] = {
        "rule": SGDRule(lr=0.5), "selection": Selection("bernoulli", unit=unit, probability=0.4),
        "strength": Strength("fixed", selected=2.0, rest=0.5), "draw": Draw(3, 4),
    }  # fmt: skip
    start, grad = torch.randn(9, 7), torch.ones(9, 7)
    whole = Item(start.clone(), grad, {}, 5)
    selective_step([whole], **how, backend="reference")
    assert len(whole.param.sub(start).unique()) > 1 or unit == "tensor"
    for dim in (0, 1):
        for (part, shard), (wanted, _) in zip(cut(start, dim, 4), cut(whole.param, dim, 4), strict=True):
            mine = Item(part.clone(), torch.ones_like(part), {}, 5, shard=shard)
            for step in begin_sharded([mine], **how, backend=backend):
                step.resume()
            torch.testing.assert_close(mine.param, wanted)


def test_numbers_of_indices_beyond_32_bits() -> None:
    draw, start = Draw(5, 6), 2**32 - 3
    expected = uniform_bits(draw, 7, 6, offset=start)
    assert torch.equal(bits_at(draw, 7, torch.arange(start, start + 6), 2**33), expected)


@given(st.lists(st.floats(-1e60, 1e60, allow_nan=False), min_size=1, max_size=40), st.randoms())
def test_sums_do_not_depend_on_the_order(values: list[float], random: Any) -> None:
    """The same bits in any order, and as near to the exact sum as adding in float64 is."""
    x = torch.tensor(values, dtype=torch.float64)
    found = number(digits(x).sum(0, dtype=torch.int32))
    random.shuffle(values)
    assert torch.equal(found, number(digits(torch.tensor(values, dtype=torch.float64)).sum(0, dtype=torch.int32)))
    exact, size = math.fsum(values), math.fsum(map(abs, values))
    assert abs(float(found) - exact) <= 8 * 2**-53 * size + len(values) * 2.0**-320


def test_one_number_comes_back_exactly() -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**-300, 1e-80, 5e85, -(2.0**302)], dtype=torch.float64)
    assert torch.equal(number(digits(x)), x)
    bad = torch.tensor([float("nan"), float("inf"), -float("inf"), 2.0**310], dtype=torch.float64)
    assert number(digits(bad)).isnan().all()


def _select(parts_of: list[tuple[Tensor, Shard]], k: int) -> list[Tensor]:
    def one(score: Tensor, shard: Shard) -> Generator[Tensor, Tensor, Tensor]:
        ranked = ranking.Ranked(ranking.key_of(score), k, shard)
        yield from ranking.find([ranked])
        extra = yield from ties.settle([ranked], torch.ones(2, dtype=torch.int32))
        assert extra.tolist() == [len(parts_of)] * 2, "what travels along is summed"
        return ranking.selected(ranked).reshape(score.shape)

    return together([one(score, shard) for score, shard in parts_of])


def _agrees(score: Tensor, k: int, dim: int, many: int, how: Any) -> None:
    wanted = top_k(score, k, backend="reference")
    found = _select(cut(score, dim, many, how), k)
    for mine, (theirs, _) in zip(found, cut(wanted, dim, many, how), strict=True):
        assert torch.equal(mine, theirs)


@given(
    rows=st.integers(1, 9), columns=st.integers(1, 9), many=st.integers(1, 5), way=st.sampled_from(WAYS),
    values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, 1e-45, float("inf"), -float("inf"), float("nan")]),
                    min_size=81, max_size=81),
    share=st.floats(0.01, 1.0), double=st.booleans(),
)  # fmt: skip
def test_the_k_largest(
    rows: int, columns: int, many: int, way: Any, values: list[float], share: float, double: bool
) -> None:
    """Ties everywhere, NaN, signed zeros, infinities, empty parts."""
    dtype = torch.float64 if double else torch.float32
    score = torch.tensor(values[: rows * columns], dtype=dtype).reshape(rows, columns)
    _agrees(score, max(int(share * score.numel()), 1), way[0], many, way[1])


@pytest.mark.parametrize(
    "shape, dim, rounds", [((200, 4), 1, 1), ((700, 3), 1, 2), ((66_000, 2), 1, 2), ((2**21 + 1, 2), 1, 3)]
)
def test_ties_over_many_cells(shape: tuple[int, int], dim: int, rounds: int) -> None:
    """One round or two or three of ties; half of the scores equal the K-th."""
    score = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).float()
    shards = cut(score, dim, 2)
    assert ties.tie_rounds([shards[0][1]]) == rounds
    for k in (1, score.numel() // 3, score.numel() * 2 // 3, score.numel()):
        _agrees(score, k, dim, 2, parts)


def test_a_tie_by_local_order_would_be_wrong() -> None:
    """The twin: lower ranks first, as one would take them by rows, is another selection by columns."""
    score, k = torch.ones(4, 4), 6
    wanted = top_k(score, k, backend="reference")
    by_rank = torch.zeros(4, 4, dtype=torch.bool)
    by_rank[:, :2].view(4, 2)[:3] = True
    assert int(by_rank.sum()) == k and not torch.equal(by_rank, wanted)
    _agrees(score, k, 1, 2, parts)


def test_keys_have_the_order_of_the_scores() -> None:
    x = torch.tensor([-float("inf"), -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, float("inf")])
    for score in (x, x.double()):
        key = ranking.key_of(score)
        assert torch.equal(key.sort().indices.sort().values, torch.arange(8)) and bool((key[1:] >= key[:-1]).all())
        assert key[3] == key[4] and torch.equal(value_of(key), score + 0.0)
        assert (ranking.key_of(torch.full_like(score, float("nan"))) < key.min()).all()
