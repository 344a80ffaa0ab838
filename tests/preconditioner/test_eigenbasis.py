"""Eigenbasis: shapes and memory, the schedule, what is carried, and what the rotation is for."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import F64, apart, orthogonal, orthogonality
from torch import Tensor

from selective import AdaDiag, Eigenbasis
from selective.preconditioner import Carry, preconditioner_from
from selective.preconditioner.linalg import Precision

EPS = torch.finfo(torch.float32).eps
SOLVERS = ["eigh", "svd", "qr", "cholesky"]


def randoms(shape: tuple[int, ...], seed: int, count: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def advance(basis: Eigenbasis, states: list[Any], grads: list[Tensor]) -> list[Carry | None]:
    """Statistics of these gradients, and a refresh from them."""
    basis.observe(states, grads)
    return basis.refresh(states, grads)


def carried(carry: Carry | None, x: Tensor) -> Tensor:
    """A first moment in the new space, as base.py says."""
    if carry is None:
        return x
    x = x if carry.left is None else carry.left @ x
    return x if carry.right is None else x @ carry.right


# Shapes, state, memory


@pytest.mark.parametrize(
    "sides,shape,expected",
    [
        ("one", (1, 4, 9), ("rows",)),
        ("one", (3, 9, 4), ("columns",)),
        ("one", (1, 5, 5), ("columns",)),
        ("two", (1, 4, 9), ("rows", "columns")),
        ("rows", (1, 4, 9), ("rows",)),
        ("columns", (1, 4, 9), ("columns",)),
        ("unsharded", (1, 4, 9), ("columns",)),
        ("two", (1, 4, 11), ("rows",)),  # max_dim below is 10
        ("two", (1, 11, 4), ("columns",)),
        ("one", (1, 4, 11), ("rows",)),
        ("one", (1, 11, 12), ()),
        ("rows", (1, 11, 4), ()),
        ("two", (1, 1, 9), ()),
        ("two", (1, 9, 1), ()),
        ("two", (1, 1, 1), ()),
        ("two", (0, 4, 9), ()),
        ("two", (1, 0, 9), ()),
        ("two", (2, 4, 0), ()),
    ],
)
def test_which_sides(sides: Any, shape: tuple[int, int, int], expected: tuple[str, ...]) -> None:
    basis = Eigenbasis(sides=sides, max_dim=10)
    assert basis.sides_of(shape) == expected
    assert basis.takes(shape) is bool(expected)
    state = basis.init_state(torch.empty(shape))
    assert [name for name in state if name.endswith("_basis")] == [f"{side}_basis" for side in expected]
    x = torch.ones(shape)
    advance(basis, [state], [x])
    (back,) = basis.project_out([state], basis.project_in([state], [x]))
    assert back is not x and back.shape == x.shape
    if not expected:
        assert torch.equal(back, x)


COUNTERS = 5 * 8  # int64


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("rows,columns", [(6, 10), (10, 6), (7, 7)])
def test_memory_is_what_the_docstring_says(rows: int, columns: int, batch: int) -> None:
    def size(basis: Eigenbasis) -> int:
        state = basis.init_state(torch.empty(batch, rows, columns))
        assert all(value.dtype == torch.int64 for value in state.values() if value.ndim == 0)
        assert all(value.dtype == torch.float32 for value in state.values() if value.ndim)
        return sum(value.numel() * value.element_size() for value in state.values())

    small, both = min(rows, columns) ** 2, rows**2 + columns**2
    noise = 4 * batch
    assert size(Eigenbasis(sides="one", statistic="gradient")) == 4 * batch * small + noise + COUNTERS
    assert size(Eigenbasis(sides="two", statistic="gradient", floor=0)) == 4 * batch * both + noise + COUNTERS
    assert size(Eigenbasis(sides="one")) == 4 * batch * 2 * small + COUNTERS
    assert size(Eigenbasis(sides="two")) == 4 * batch * 2 * both + COUNTERS
    assert size(Eigenbasis(sides="two", max_dim=5)) == COUNTERS


def test_state_is_float32_whatever_the_default_is() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        state = Eigenbasis().init_state(torch.empty(1, 3, 4, dtype=torch.float32))
    finally:
        torch.set_default_dtype(before)
    assert {value.dtype for value in state.values() if value.ndim} == {torch.float32}


def test_nothing_is_written_on_what_is_passed_in() -> None:
    for basis in (Eigenbasis(), AdaDiag(sides="two")):
        states = [basis.init_state(torch.empty(1, 4, 5)) for _ in range(2)]
        kept = [{name: (value, value.data_ptr()) for name, value in state.items()} for state in states]
        grads = randoms((1, 4, 5), seed=0, count=2)
        before = [grad.clone() for grad in grads]
        advance(basis, states, grads)
        basis.project_out(states, basis.project_in(states, grads))
        assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))
        for state, old in zip(states, kept, strict=True):  # in place: a checkpoint's view of it stays valid
            assert {name: (value, value.data_ptr()) for name, value in state.items()} == old


# The schedule


@pytest.mark.parametrize("count", [1, 3, 10, 25, 154])
@pytest.mark.parametrize("every", [1, 4, 10, 200])
@pytest.mark.parametrize("start", [0, 7])
def test_staggered_refreshes_are_spread_evenly(count: int, every: int, start: int) -> None:
    basis = Eigenbasis(statistic="gradient", refresh_every=every, start_step=start, stagger=True)
    due = [[i for i in range(count) if basis.is_due(step, i, count)] for step in range(start + 3 * every + 20)]
    assert not any(due[:start])
    first = [next(step for step, some in enumerate(due) if i in some) for i in range(count)]
    assert all(start <= step < start + min(every, 10) for step in first)
    for begin in range(start + 10, start + 10 + every):  # any `every` steps in a row after the first round
        window = due[begin : begin + every]
        assert sorted(i for some in window for i in some) == list(range(count))
        loads = [len(some) for some in window]
        assert max(loads) - min(loads) <= 1
    assert max(map(len, due)) <= -(-count // every) + -(-count // min(every, 10))


def test_together_without_stagger_and_the_same_whenever_it_is_asked() -> None:
    basis = Eigenbasis(refresh_every=10, stagger=False, start_step=3)
    due = [step for step in range(40) if basis.is_due(step, 2, 5)]
    assert due == [3, 13, 23, 33]
    assert due == [step for step in range(40) if basis.is_due(step, 0, 1)]
    assert [step for step in range(25) if Eigenbasis(stagger=False).is_due(step, 0, 1)] == [1, 11, 21]  # observed first
    assert [step for step in range(25) if Eigenbasis(statistic="gradient").is_due(step, 0, 1)] == [0, 10, 20]
    assert set(inspect.signature(basis.is_due).parameters) == {"steps", "place", "count"}  # nothing of a state


# The carry


@pytest.mark.parametrize("sides", ["one", "two", "rows", "columns"])
@pytest.mark.parametrize("statistic", ["gradient", "ema"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("count", [1, 2])
def test_the_carry_leaves_the_momentums_meaning(solver: Any, statistic: Any, sides: Any, count: int) -> None:
    """Projected out before and after a refresh it is the same tensor; four products of 9, each within 9 eps.

    The twin: with carry="keep" the same momentum means another tensor.
    """
    for carry in ("squared", "rotate", "keep"):
        basis = Eigenbasis(solver=solver, statistic=statistic, sides=sides, carry=carry)
        states = [basis.init_state(torch.empty(2, 6, 9)) for _ in range(count)]
        for seed in range(3):
            advance(basis, states, randoms((2, 6, 9), seed, count=count))
        momenta = randoms((2, 6, 9), seed=9, count=count)
        before = basis.project_out(states, momenta)
        carries = advance(basis, states, randoms((2, 6, 9), seed=8, count=count))
        after = basis.project_out(states, [carried(c, m) for c, m in zip(carries, momenta, strict=True)])
        off = max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))
        bound = 4 * 9 * EPS * max(float(m.norm()) for m in momenta)
        assert (off <= bound) is (carry != "keep"), (off, bound)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("statistic", ["gradient", "ema"])
def test_a_refresh_from_the_same_statistics_carries_nearly_the_identity(solver: Any, statistic: Any) -> None:
    """Signs follow the old basis. Eigenvalues are a factor of 0.49 apart, so directions are good to eps · λ₁ / gap."""
    left, right = orthogonal(6, 0), orthogonal(6, 1)
    grad = (left * 0.7 ** torch.arange(6, dtype=F64) @ right.mT).float()[None]
    basis = Eigenbasis(solver=solver, statistic=statistic, carry="rotate")
    states = [basis.init_state(grad)]
    for _ in range(40):  # subspace iteration needs some steps to get there
        (carry,) = advance(basis, states, [grad])
    assert carry is not None and carry.left is not None and carry.right is not None
    for turn in (carry.left, carry.right):
        assert (turn[0] - torch.eye(6)).abs().max() <= 16 * EPS * 2 / 0.7**10
    for order in (carry.rows, carry.columns):
        assert order is not None and order.tolist() == [list(range(6))]


@pytest.mark.parametrize("solver", ["qr", "cholesky"])
def test_signs_follow_a_column_to_its_new_place(solver: Any) -> None:
    """Each new column leans to the side of the old one that it was, which sorting has moved."""
    moved = 0
    for seed in range(10):
        basis = Eigenbasis(sides="rows", solver=solver, carry="rotate")
        states = [basis.init_state(torch.empty(1, 6, 6))]
        states[0]["rows_basis"].copy_(orthogonal(6, seed))
        states[0]["refreshes"].fill_(1)
        old = states[0]["rows_basis"].clone()
        (carry,) = advance(basis, states, randoms((1, 6, 6), seed))
        assert carry is not None and carry.rows is not None
        order = carry.rows[0]
        moved += int((order != torch.arange(6)).sum())
        assert ((states[0]["rows_basis"] * old[..., order]).sum(-2) >= 0).all()
    assert moved > 0


@pytest.mark.parametrize("solver", ["qr", "cholesky"])
def test_no_column_moves_where_nothing_follows(solver: Any) -> None:
    """carry="keep": the old basis is one of eigenvectors, in the wrong order, and stays."""
    basis = Eigenbasis(sides="rows", solver=solver, carry="keep")
    states = [basis.init_state(torch.empty(1, 3, 3))]
    states[0]["refreshes"].fill_(1)
    states[0]["rows_gram"].copy_(torch.diag(torch.tensor([1.0, 3.0, 2.0])))
    assert basis.refresh(states, [torch.empty(1, 3, 3)]) == [Carry()]
    assert (states[0]["rows_basis"][0] - torch.eye(3)).abs().max() <= 2 * EPS


def test_second_moments_follow_their_columns() -> None:
    """`rows` and `columns` say which old one each new one was: variances of the rotated gradients stay with them."""
    scales = torch.tensor([1.0, 8.0, 3.0, 20.0])
    basis = Eigenbasis(solver="qr", carry="rotate")
    states = [basis.init_state(torch.empty(1, 4, 4))]
    states[0]["refreshes"].fill_(1)  # go on from the identity
    for side in ("rows", "columns"):
        states[0][f"{side}_gram"].copy_(torch.diag(scales)[None])
    second = scales[:, None] * scales[None, :]  # v of a gradient with these variances
    (carry,) = basis.refresh(states, [torch.empty(1, 4, 4)])
    assert carry is not None and carry.rows is not None and carry.columns is not None
    permuted = second[carry.rows[0]][:, carry.columns[0]]
    (rotated,) = basis.project_in(states, [second.sqrt()[None]])
    assert torch.allclose(rotated[0].square(), permuted, rtol=1e-5)
    assert permuted[0, 0] == 400  # sorted: the largest first


# What it is for


@settings(max_examples=60)
@given(
    batch=st.integers(1, 3), rows=st.integers(1, 12), columns=st.integers(1, 12), count=st.integers(1, 3),
    sides=st.sampled_from(["one", "two", "rows", "columns", "unsharded"]), solver=st.sampled_from(SOLVERS),
    statistic=st.sampled_from(["gradient", "ema"]), rank=st.integers(0, 12), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_any_shape_there_and_back(
    batch: int, rows: int, columns: int, count: int, sides: Any, solver: Any, statistic: Any, rank: int, seed: int
) -> None:
    basis = Eigenbasis(sides=sides, solver=solver, statistic=statistic)
    generator = torch.Generator().manual_seed(seed)
    states = [basis.init_state(torch.empty(batch, rows, columns)) for _ in range(count)]
    for _ in range(3):
        shapes = [((batch, rows, rank), (batch, rank, columns))] * count
        pairs = [[torch.randn(shape, generator=generator) for shape in both] for both in shapes]
        advance(basis, states, [a @ b for a, b in pairs])
    xs = [torch.randn(batch, rows, columns, generator=generator) for _ in states]
    basis.observe(states, xs)  # the step of the refresh is over
    rotated = basis.project_in(states, xs)
    back = basis.project_out(states, rotated)
    for state in states:
        assert all(orthogonality(value) <= 1e-5 for name, value in state.items() if name.endswith("_basis"))
    for x, there, again in zip(xs, rotated, back, strict=True):
        assert there.shape == again.shape == x.shape
        # Two bases each within 1e-5 of orthogonal (in truth a few eps), products of up to 12.
        assert (again - x).abs().max() <= (2e-5 + 4 * 12 * EPS) * x.norm()
        assert abs(float(there.norm() / x.norm()) - 1) <= 2e-5 + 4 * 12 * EPS


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_rotated_gradients_covariance_is_diagonal(solver: Any) -> None:
    """Of gradients L Z R with fixed L and R: after 200 steps the rotated rows and columns are uncorrelated."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(6, 6, generator=generator), torch.randn(8, 8, generator=generator)
    grads = [(left @ torch.randn(6, 8, generator=generator) @ right)[None] for _ in range(200)]
    basis = Eigenbasis(solver=solver, beta=0.99)
    states = [basis.init_state(grads[0])]
    for grad in grads:
        advance(basis, states, [grad])

    def correlation(gram: Tensor) -> float:
        deviation = gram.diagonal().sqrt()
        unit = gram / deviation[:, None] / deviation
        return float((unit - torch.eye(len(gram))).abs().max())

    for side in ("rows", "columns"):
        gram, q = states[0][f"{side}_gram"][0], states[0][f"{side}_basis"][0]
        before, after = correlation(gram), correlation(q.mT @ gram @ q)
        assert before > 0.5
        assert after < 0.05  # power steps trail a moving average; eigh is exact
        if solver in ("eigh", "svd"):
            assert after < 1e-3


def adam(grad: Tensor, moments: dict[str, Tensor], step: int) -> Tensor:
    """Adam's update in the dtype of the gradient: β = (0.9, 0.95), ε = 1e-12."""
    m, v = (moments.setdefault(k, torch.zeros_like(grad)) for k in ("m", "v"))
    m.mul_(0.9).add_(grad, alpha=0.1)
    v.mul_(0.95).addcmul_(grad, grad, value=0.05)
    return m / (1 - 0.9**step) / ((v / (1 - 0.95**step)).sqrt() + 1e-12)


def test_a_fixed_basis_is_adam_in_the_eigenbasis() -> None:
    """Kronecker curvature: loss ½ ⟨W − W*, A (W − W*) B⟩, gradient A (W − W*) B, P and Q the eigenvectors of A and B.

    Rotated, that is a quadratic with a diagonal Hessian, λᵢ μⱼ for each coordinate, and Adam there is the reference, in
    float64. Gradients and updates are rounded to float32 and multiplied, at most 8 terms, on the way: a few eps of
    their size, which the step sizes (2.5 in sum) and the curvature (0.5 to 8) turn into as much of the weights'.
    """
    p, q = orthogonal(6, 0), orthogonal(8, 1)
    rows, columns = torch.linspace(1, 4, 6, dtype=F64), torch.linspace(0.5, 2, 8, dtype=F64)
    a, b = (p * rows @ p.mT), (q * columns @ q.mT)
    basis = Eigenbasis()
    states = [basis.init_state(torch.empty(1, 6, 8))]
    states[0]["rows_basis"].copy_(p)
    states[0]["columns_basis"].copy_(q)
    start = randoms((6, 8), seed=2)[0].to(F64)
    weights, reference = start.clone(), p.mT @ start @ q
    plain = start.clone()
    kept: tuple[dict[str, Tensor], ...] = ({}, {}, {})
    rates = [0.05 * (1 - step / 100) for step in range(100)]
    for step, rate in enumerate(rates, 1):
        (grad,) = basis.project_in(states, [(a @ weights @ b).float()[None]])
        (update,) = basis.project_out(states, [adam(grad, kept[0], step)])
        weights -= rate * update[0].to(F64)
        reference -= rate * adam(rows[:, None] * reference * columns, kept[1], step)
        plain -= rate * adam(a @ plain @ b, kept[2], step)
    assert (p.mT @ weights @ q - reference).norm() <= 8 * EPS * start.norm()
    assert (weights - plain).norm() > 0.1 * start.norm()  # the twin: Adam as it is goes elsewhere


def test_a_power_step_follows_a_slowly_turning_covariance() -> None:
    """As in training: 60 refreshes while the true eigenvectors turn by 0.01 a step; the space is never far off."""
    x = randoms((6, 6), seed=0)[0].to(F64)
    turn = torch.linalg.matrix_exp(0.01 * (x - x.mT))
    axes, values = orthogonal(6, 1), 0.5 ** torch.arange(6, dtype=F64)
    for solver in ("qr", "cholesky"):
        basis = Eigenbasis(sides="rows", solver=solver)
        states, now = [basis.init_state(torch.empty(1, 6, 6))], axes
        for _ in range(60):
            now = turn @ now
            states[0]["rows_gram"].copy_(now * values @ now.mT)
            basis.refresh(states, [torch.empty(1, 6, 6)])
        assert apart(states[0]["rows_basis"], now[None]) < 0.1
        assert apart(axes[None], now[None]) > 0.5  # had it stood still


# Everything is in the state


@pytest.mark.parametrize("statistic", ["gradient", "ema"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_going_on_from_a_saved_state_is_bit_for_bit(solver: Any, statistic: Any, tmp_path: Any) -> None:
    """Saved right after a refresh and between two of them, with `weights_only`, beside a preconditioner from JSON."""
    basis = Eigenbasis(solver=solver, statistic=statistic, refresh_every=4)
    grads = [randoms((2, 4, 6), seed, count=2) for seed in range(16)]

    def run(basis: Eigenbasis, states: list[Any], steps: range) -> list[Tensor]:
        seen = []
        for step in steps:
            for place, (state, grad) in enumerate(zip(states, grads[step], strict=True)):
                if basis.is_due(step, place, 2):
                    basis.refresh([state], [grad])
            seen += basis.project_in(states, grads[step])
            basis.observe(states, grads[step])
        return seen

    for cut in (5, 7):
        states = [basis.init_state(torch.empty(2, 4, 6)) for _ in range(2)]
        run(basis, states, range(cut))
        torch.save(states, tmp_path / "states.pt")
        expected = run(basis, states, range(cut, 16))
        loaded = torch.load(tmp_path / "states.pt", weights_only=True)
        again = run(Eigenbasis.model_validate_json(basis.model_dump_json()), loaded, range(cut, 16))
        assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
        for state, other in zip(states, loaded, strict=True):
            assert all(torch.equal(state[name], other[name]) for name in state)
            assert {name: value.dtype for name, value in state.items()} == {n: v.dtype for n, v in other.items()}


def test_precision_is_of_the_products_alone() -> None:
    """State is the same bits; rotated tensors differ by a few of bfloat16's eps, 2^-8, and no more."""
    grads = [randoms((1, 16, 24), seed) for seed in range(4)]
    found = {}
    for precision in ("float32", "bfloat16"):
        basis = Eigenbasis(precision=precision)
        states = [basis.init_state(grads[0][0])]
        for grad in grads:
            advance(basis, states, grad)
        (rotated,) = basis.project_in(states, grads[0])
        (back,) = basis.project_out(states, [rotated])
        found[precision] = (states[0], rotated, back)
    (state, exact, _), (other, low, back) = found["float32"], found["bfloat16"]
    assert all(torch.equal(state[name], other[name]) for name in state)
    for x in (exact, grads[0][0]):
        off = float(((low if x is exact else back) - x).norm() / x.norm())
        assert 2**-12 < off < 4 * 2**-8


def test_the_report_is_numbers_of_its_own() -> None:
    basis = Eigenbasis()
    states = [basis.init_state(torch.empty(1, 4, 6)) for _ in range(2)]
    (first, _) = basis.report(states)
    advance(basis, states, randoms((1, 4, 6), seed=0, count=2))
    assert list(first) == ["refreshes", "skipped", "float64", "cpu", "kept"]
    assert all(value.ndim == 0 and int(value) == 0 for value in first.values())
    assert [int(report["refreshes"]) for report in basis.report(states)] == [1, 1]


class InBfloat16(AdaDiag):
    precision: Precision = "bfloat16"


def test_the_default_of_precision_goes_by_the_statistic_unless_a_class_has_its_own() -> None:
    found = [space.precision for space in (Eigenbasis(), Eigenbasis(statistic="gradient"), AdaDiag(), InBfloat16())]
    assert found == ["tf32", "float32", "float32", "bfloat16"]
    assert preconditioner_from(InBfloat16().model_dump()).precision == "bfloat16"
