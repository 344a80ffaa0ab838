"""Exactly K coordinates, ties to the lower index, on inputs that are made to break it, through the public interface.

The mask is read off the parameter: SGD has learning rate 1 and the parameter starts at 0, so that it becomes
-mask * update. So that updates are not 0 where scores are, a first dense step fills SGD's momentum: with mu = 1/2 and a
zero gradient the update is half the first gradient, whatever the score.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from selective import MGUP, Dense, SelectiveUpdate

ALPHA, GAMMA = 2.0, 0.5


def stepped(first: Tensor, second: Tensor, policy: MGUP, capture: str = "auto") -> tuple[Tensor, float]:
    """The selected coordinates (as bool) in the second step of SGD with momentum 1/2, and the share it reported."""
    p = torch.nn.Parameter(torch.zeros_like(first))
    base = torch.optim.SGD([p], lr=1.0, momentum=0.5)
    p.grad = first.clone()
    SelectiveUpdate(base, policy=Dense()).step()
    with torch.no_grad():
        p.zero_()
    optimizer = SelectiveUpdate(base, policy=policy, capture=capture)  # type: ignore[arg-type]
    p.grad = second.clone()
    optimizer.step()
    multiplier = -p.detach() / (0.5 * first + second)
    assert bool(((multiplier == ALPHA) | (multiplier == GAMMA) | multiplier.isnan()).all())
    return multiplier == ALPHA, float(optimizer.statistics()["param_groups[0][0]"]["share"])


def first_k(n: int, k: int) -> Tensor:
    return torch.arange(n) < k


@pytest.mark.parametrize("capture", ["fused", "scratch", "delta"])
@pytest.mark.parametrize("score", ["update", "momentum", "nesterov"])
@pytest.mark.parametrize("n,tau", [(2, 0.5), (7, 0.5), (10, 0.3), (1000, 0.999), (1000, 0.001), (70_000, 0.5)])
def test_all_zero_gradients_select_the_first_k(n: int, tau: float, score: str, capture: str) -> None:
    """Every score is ±0 (the updates have both signs): all are equal."""
    first = torch.where(torch.arange(n) % 3 == 0, -1.0, 1.0)
    got, share = stepped(first, torch.zeros(n), MGUP(tau=tau, alpha=ALPHA, gamma=GAMMA, score=score), capture)  # type: ignore[arg-type]
    assert torch.equal(got, first_k(n, int(tau * n)))
    assert share == pytest.approx(int(tau * n) / n, rel=1e-6)  # the share is a float32


def test_signed_zero_gradients_are_equal() -> None:
    signed = torch.where(torch.arange(100) % 2 == 0, -0.0, 0.0)
    got, _ = stepped(torch.ones(100), signed, MGUP(alpha=ALPHA, gamma=GAMMA))
    assert torch.equal(got, first_k(100, 50))


@pytest.mark.parametrize("shape", [(64,), (8, 8), (2, 4, 8)])
def test_all_equal_scores_select_the_first_k_in_row_major_order(shape: tuple[int, ...]) -> None:
    ones = torch.ones(shape)
    got, _ = stepped(ones, ones, MGUP(tau=0.3, alpha=ALPHA, gamma=GAMMA))
    assert torch.equal(got.flatten(), first_k(64, 19))  # floor(0.3 * 64)


def test_ties_in_a_transposed_parameter_go_by_row_major_index() -> None:
    first = torch.ones(6, 4).t()
    got, _ = stepped(first, torch.zeros(6, 4).t(), MGUP(tau=0.4, alpha=ALPHA, gamma=GAMMA))
    assert torch.equal(got.reshape(-1), first_k(24, 9))  # floor(0.4 * 24)


def test_a_huge_tie_at_the_threshold_takes_the_lower_indices_and_all_that_are_larger() -> None:
    n = 100_000
    second = torch.ones(n)
    second[torch.arange(3, n, 1000)] = 4.0  # 100 larger ones, everywhere
    second[torch.arange(5, n, 10)] = -0.25  # 10,000 negative scores: the update is (0.5 - 0.25) > 0
    got, share = stepped(torch.ones(n), second, MGUP(alpha=ALPHA, gamma=GAMMA))
    wanted = second == 4.0
    tied = torch.nonzero(second == 1.0).flatten()
    wanted[tied[: n // 2 - int(wanted.sum())]] = True
    assert torch.equal(got, wanted)
    assert share == 0.5


def test_negative_scores_are_selected_when_there_is_nothing_better() -> None:
    """The score is signed: the least negative come before the more negative, and none of them is a magnitude."""
    first = torch.full((8,), 4.0)
    second = torch.tensor([-1.0, -0.5, -0.9, -0.125, -0.25, -0.75, -0.0625, -1.0])
    score = (0.5 * first + second) * second
    assert bool((score < 0).all())
    got, _ = stepped(first, second, MGUP(alpha=ALPHA, gamma=GAMMA))
    wanted = torch.zeros(8, dtype=torch.bool)
    wanted[score.argsort(descending=True)[:4]] = True
    assert torch.equal(got, wanted)


def test_overflowing_scores_are_ranked_as_infinities() -> None:
    """float32: updates stay finite, their products with the gradient don't."""
    first = torch.full((8,), 2e30)
    second = torch.tensor([-1e20, 1e20, 0.0, 1e20, -1e20, 1e20, 0.0, 1e20])  # scores -inf, +inf, 0
    got, _ = stepped(first, second, MGUP(tau=0.375, alpha=ALPHA, gamma=GAMMA))
    assert torch.nonzero(got).flatten().tolist() == [1, 3, 5]  # the first three of four +inf
    got, _ = stepped(first, second, MGUP(tau=0.875, alpha=ALPHA, gamma=GAMMA))
    assert torch.nonzero(~got).flatten().tolist() == [4]  # seven of eight: the last -inf stays


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_gradients_leave_the_others_their_places(bad: float) -> None:
    """NaN is never selected; an infinite gradient is its own update's largest score, whatever its sign."""
    second = torch.arange(1.0, 9.0)
    second[[1, 6]] = bad
    got, share = stepped(torch.ones(8), second, MGUP(alpha=ALPHA, gamma=GAMMA))
    finite = [0, 2, 3, 4, 5, 7]
    if math.isnan(bad):
        assert [i for i in finite if got[i]] == [3, 4, 5, 7]
    else:
        assert [i for i in finite if got[i]] == [5, 7]  # two places are taken by the infinite ones
    assert share == 0.5


def test_fewer_than_k_are_selected_only_where_fewer_are_not_nan() -> None:
    second = torch.full((8,), math.nan)
    second[[2, 5]] = torch.tensor([-0.125, 1.0])
    got, share = stepped(torch.ones(8), second, MGUP(alpha=ALPHA, gamma=GAMMA))
    assert torch.nonzero(got).flatten().tolist() == [2, 5]
    assert share == 0.25
    _, share = stepped(torch.ones(8), torch.full((8,), math.nan), MGUP(alpha=ALPHA, gamma=GAMMA))
    assert share == 0.0


@pytest.mark.parametrize("capture", ["fused", "scratch", "delta"])
@pytest.mark.parametrize("shape,tau", [((1,), 0.5), ((), 0.5), ((1,), 0.99), ((3,), 0.3)])
def test_where_k_is_0_the_tensor_stays_dense(shape: tuple[int, ...], tau: float, capture: str) -> None:
    p = torch.nn.Parameter(torch.zeros(shape))
    optimizer = SelectiveUpdate(torch.optim.SGD([p], lr=1.0, momentum=0.5), policy=MGUP(tau=tau), capture=capture)  # type: ignore[arg-type]
    p.grad = torch.ones(shape)
    optimizer.step()
    assert torch.equal(p.detach(), -torch.ones(shape))


def test_one_element_and_tau_1_is_selected() -> None:
    got, share = stepped(torch.ones(1), torch.ones(1), MGUP(tau=1.0, alpha=ALPHA, gamma=GAMMA))
    assert got.tolist() == [True]
    assert share == 1.0


@pytest.mark.parametrize("capture", ["fused", "scratch", "delta"])
def test_an_empty_tensor_beside_others_is_left_alone(capture: str) -> None:
    params = [torch.nn.Parameter(torch.zeros(s)) for s in ((0,), (4,), (3, 0))]
    optimizer = SelectiveUpdate(torch.optim.SGD(params, lr=1.0, momentum=0.5), policy=MGUP(), capture=capture)  # type: ignore[arg-type]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert params[1].tolist() == [-2.0, -2.0, -0.5, -0.5]
    assert [tuple(p.shape) for p in params] == [(0,), (4,), (3, 0)]


def test_untouched_embedding_rows_of_adamw_only_decay() -> None:
    """Rows that no token asked for have u = 0 and the score 0, in the middle of the ranking: nobody above them may
    lose a place to them, the count stays K, and they move by the decay factor alone."""
    rows, width, decay = 50, 8, 0.1
    table = torch.nn.Embedding(rows, width)
    before = table.weight.detach().clone()
    optimizer = SelectiveUpdate(torch.optim.AdamW(table.parameters(), lr=0.1, weight_decay=decay), policy=MGUP())
    tokens = torch.tensor([3, 11, 12, 40])
    untouched = torch.ones(rows, dtype=torch.bool)
    untouched[tokens] = False
    for _ in range(3):
        optimizer.zero_grad()
        table(tokens).sum().backward()
        optimizer.step()
        assert float(optimizer.statistics()["param_groups[0][0]"]["share"]) == 0.5
    decayed = before.double()[untouched] * (1 - 0.1 * decay) ** 3
    # one rounding a step, of the product with a factor that is itself rounded
    torch.testing.assert_close(table.weight.detach().double()[untouched], decayed, rtol=6 * 2.0**-24, atol=0)
    # a constant gradient agrees with its momentum: the touched are among the K, × 2, Adam's steps of lr each
    expected = before[tokens].double()
    for _ in range(3):
        expected = (1 - 0.1 * decay) * expected - 2 * 0.1
    # eps of Adam is 1e-8 beside gradients of 1; three steps of some ten roundings of 2^-24 each
    torch.testing.assert_close(table.weight.detach()[tokens].double(), expected, rtol=0, atol=4e-6)
