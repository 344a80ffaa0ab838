"""The ways on after a solver fails: float64, the CPU, the old basis, each counted. No solver gets a NaN or infinity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from matrices import orthogonality, with_eigenvalues
from torch import Tensor

from selective import AdaDiag, Eigenbasis
from selective.preconditioner import refresh as refreshing
from selective.preconditioner.solvers import SOLVERS, Solved

Solver = Callable[..., Any]
WHOLE = {"refreshes": 2, "skipped": 0, "float64": 0, "cpu": 0, "kept": 0}


def grads_of(seed: int, count: int = 2, shape: tuple[int, int, int] = (2, 4, 5)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def started(basis: Eigenbasis) -> list[dict[str, Tensor]]:
    """Two stacks of two matrices each with a first basis and, where it is observed, newer statistics."""
    states = [basis.init_state(x) for x in grads_of(0)]
    basis.observe(states, grads_of(0))
    basis.refresh(states, grads_of(0))
    basis.observe(states, grads_of(1))
    return states


def copies(states: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: value.clone() for name, value in state.items()} for state in states]


def counts(basis: Eigenbasis, states: list[dict[str, Tensor]]) -> list[dict[str, int]]:
    return [{name: int(value) for name, value in report.items()} for report in basis.report(states)]


def raises(*args: Any, **kwargs: Any) -> Any:
    raise torch.linalg.LinAlgError("made to fail")


def nan(matrix: Tensor, *args: Any, **kwargs: Any) -> Any:
    return Solved(torch.full_like(matrix, torch.nan), matrix[..., 0])


def parallel(matrix: Tensor, *args: Any, **kwargs: Any) -> Any:
    return Solved(torch.ones_like(matrix), matrix[..., 0])


def only_in_float64(solver: Solver) -> Solver:
    return lambda m, *args, **kwargs: raises() if m.dtype == torch.float32 else solver(m, *args, **kwargs)


def not_for(bad: Tensor, solver: Solver, failure: Solver) -> Solver:
    """Fails, for everyone in its batch, where one of its matrices is `bad`."""

    def solve(matrix: Tensor, *args: Any, **kwargs: Any) -> Any:
        here = [m.shape == bad.shape and torch.allclose(m.float(), bad) for m in matrix]
        return failure(matrix, *args, **kwargs) if any(here) else solver(matrix, *args, **kwargs)

    return solve


def patch(monkeypatch: pytest.MonkeyPatch, solver: str, function: Solver, last: Solver | None = None) -> None:
    monkeypatch.setitem(SOLVERS, solver, function)  # type: ignore[arg-type]
    if last is not None:
        monkeypatch.setattr(refreshing, "eigh", last)


@pytest.mark.parametrize("failure", [raises, nan, parallel])
@pytest.mark.parametrize("statistic", ["gradient", "ema"])
@pytest.mark.parametrize("solver", ["eigh", "svd", "qr", "cholesky"])
class TestASolverThatFails:
    def basis(self, solver: str, statistic: str) -> Eigenbasis:
        return Eigenbasis(solver=solver, statistic=statistic)

    def fail(
        self, monkeypatch: pytest.MonkeyPatch, solver: str, statistic: str, failure: Solver, last: Solver | None
    ) -> None:
        if (solver, statistic) == ("svd", "gradient"):  # of the gradient itself, both sides at once
            monkeypatch.setattr(
                refreshing, "singular_vectors", lambda g, **k: [failure(g @ g.mT), failure(g.mT @ g)]
            )  # fmt: skip
            patch(monkeypatch, solver, SOLVERS["svd"], last)
        else:
            patch(monkeypatch, solver, failure, last)

    def test_for_good_leaves_the_old_basis_bit_for_bit(self, solver, statistic, failure, monkeypatch) -> None:
        basis = self.basis(solver, statistic)
        states = started(basis)
        before = copies(states)
        self.fail(monkeypatch, solver, statistic, failure, failure)
        with pytest.warns(UserWarning, match="8 bases were to be renewed and stay"):
            assert basis.refresh(states, grads_of(2)) == [None, None]
        for state, old in zip(states, before, strict=True):
            for side in ("rows", "columns"):
                assert torch.equal(state[f"{side}_basis"], old[f"{side}_basis"])
        assert counts(basis, states) == [WHOLE | {"refreshes": 1, "kept": 2}] * 2
        xs = grads_of(3)  # and training goes on
        for x, back in zip(xs, basis.project_out(states, basis.project_in(states, xs)), strict=True):
            assert (x - back).abs().max() < 1e-5

    def test_is_helped_by_the_last_resort(self, solver, statistic, failure, monkeypatch) -> None:
        basis = self.basis(solver, statistic)
        states, healthy = started(basis), started(basis)
        reference = basis.model_copy(update={"solver": "eigh"})
        reference.refresh(healthy, grads_of(2))
        self.fail(monkeypatch, solver, statistic, failure, None)
        carries = basis.refresh(states, grads_of(2))
        assert all(carry is not None for carry in carries)
        assert counts(basis, states) == [WHOLE | {"cpu": 2}] * 2
        for state, other in zip(states, healthy, strict=True):
            assert orthogonality(state["columns_basis"]) <= 1e-5
            # eigh in float64 is eigh in float32 to eps / gap; rows are 4, all of them determined.
            assert (state["rows_basis"] - other["rows_basis"]).abs().max() <= 1e-4


@pytest.mark.parametrize("solver", ["eigh", "svd", "qr", "cholesky"])
def test_float64_is_tried_before_the_cpu(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    basis = Eigenbasis(solver=solver)
    states, healthy = started(basis), started(basis)
    basis.refresh(healthy, grads_of(2))
    patch(monkeypatch, solver, only_in_float64(SOLVERS[solver]), raises)  # type: ignore[index]
    basis.refresh(states, grads_of(2))
    assert counts(basis, states) == [WHOLE | {"float64": 2}] * 2
    for state, other in zip(states, healthy, strict=True):
        assert (state["rows_basis"] - other["rows_basis"]).abs().max() <= 1e-4


@pytest.mark.parametrize("failure", [raises, nan])
@pytest.mark.parametrize("solver", ["eigh", "svd", "qr", "cholesky"])
def test_one_that_fails_does_not_hurt_its_neighbours(
    solver: str, failure: Solver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first matrix of the second stack is the one: its rows only, its columns are refreshed."""
    basis = Eigenbasis(solver=solver)
    states, healthy = started(basis), started(basis)
    states[1]["rows_basis"][0] = states[1]["rows_basis"][0].flip(-1)  # its columns would be sorted
    before = copies(states)
    basis.refresh(healthy, grads_of(2))
    gram = states[1]["rows_gram"][0]
    bad = gram / gram.diagonal().max()

    def only_bad(matrix: Tensor, *args: Any, **kwargs: Any) -> Any:
        if failure is raises:
            return raises()
        good = SOLVED(matrix, *args, **kwargs)
        hit = torch.tensor([torch.allclose(m.float(), bad) for m in matrix])
        return good._replace(basis=torch.where(hit[:, None, None], torch.nan, good.basis))

    SOLVED = SOLVERS[solver]  # type: ignore[index]
    guarded = not_for(bad, SOLVED, only_bad)
    patch(monkeypatch, solver, guarded, not_for(bad, refreshing.eigh, raises))
    with pytest.warns(UserWarning, match=r"\d bases were to be renewed"):
        carries = basis.refresh(states, grads_of(2))
    assert counts(basis, states) == [WHOLE, WHOLE | {"kept": 1}]
    assert torch.equal(states[1]["rows_basis"][0], before[1]["rows_basis"][0])
    assert carries[1] is not None and carries[1].left is not None
    assert torch.equal(carries[1].left[0], torch.eye(4))  # exactly
    if carries[1].rows is not None:
        assert torch.equal(carries[1].rows[0], torch.arange(4))
    for state, other in zip(states, healthy, strict=True):
        untouched = [(state[k], other[k]) for k in ("rows_basis", "columns_basis")]
        for mine, theirs in untouched:
            mine, theirs = (x if x.shape[-1] == 5 or state is states[0] else x[1:] for x in (mine, theirs))
            assert (mine - theirs).abs().max() <= 1e-5  # a batch of one rounds otherwise


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("solver", ["eigh", "svd", "qr", "cholesky"])
def test_a_gradient_that_is_not_finite_changes_nothing(
    value: float, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics and basis stay as they were, bit for bit, and no solver sees it. 3e38 is finite, its square is not."""

    def watched(solve: Solver) -> Solver:
        def checked(matrix: Tensor, *args: Any, **kwargs: Any) -> Any:
            assert matrix.isfinite().all()
            return solve(matrix, *args, **kwargs)

        return checked

    for statistic in ("gradient", "ema"):
        with monkeypatch.context() as patch_:
            basis = Eigenbasis(solver=solver, statistic=statistic)
            states = started(basis)
            before = copies(states)
            grads = grads_of(2)
            grads[0][1, 2, 3] = value
            patch_.setitem(SOLVERS, solver, watched(SOLVERS[solver]))  # type: ignore[arg-type,index]
            patch_.setattr(refreshing, "singular_vectors", watched(refreshing.singular_vectors))
            if statistic == "ema":
                basis.observe(states, grads)
                for side in ("rows", "columns"):
                    assert torch.equal(states[0][f"{side}_gram"][1], before[0][f"{side}_gram"][1])
                    assert not torch.equal(states[0][f"{side}_gram"][0], before[0][f"{side}_gram"][0])
            basis.refresh(states, grads)
            reported = counts(basis, states)
            if statistic == "gradient" and value == 3e38:  # gradients are scaled before they are squared
                assert reported == [WHOLE, WHOLE]
            else:
                assert reported == [WHOLE | {"skipped": 1}, WHOLE]
                if statistic == "gradient":
                    assert torch.equal(states[0]["rows_basis"][1], before[0]["rows_basis"][1])
            assert all(bool(tensor.isfinite().all()) for state in states for tensor in state.values())


def test_without_the_guard_a_solver_meets_nan() -> None:
    """The twin: what torch does with it."""
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.eigh(torch.full((1, 4, 4), torch.nan))


def test_a_zero_gradient_is_no_failure_and_no_refresh() -> None:
    for basis in (Eigenbasis(), AdaDiag(sides="two")):
        states = [basis.init_state(torch.empty(2, 4, 5))]
        grads = [torch.zeros(2, 4, 5)]
        basis.observe(states, grads)
        assert basis.refresh(states, grads) == [None]
        assert counts(basis, states) == [WHOLE | {"refreshes": 0}]
        assert torch.equal(states[0]["rows_basis"], torch.eye(4).repeat(2, 1, 1))


@pytest.mark.parametrize("solver", ["qr", "cholesky"])
def test_beside_a_zero_gradient_others_go_on(solver: str) -> None:
    """The stack of both has an order of columns; of the zero matrix nothing moves, neither basis nor moments."""
    basis = Eigenbasis(solver=solver, statistic="gradient", carry="rotate")
    for seed in range(10):
        states = [basis.init_state(torch.empty(2, 8, 8))]
        basis.refresh(states, grads_of(seed, 1, (2, 8, 8)))
        before = copies(states)
        grads = grads_of(seed + 10, 1, (2, 8, 8))
        grads[0][0] = 0
        (carry,) = basis.refresh(states, grads)
        assert carry is not None and carry.left is not None and carry.rows is not None and carry.columns is not None
        assert torch.equal(states[0]["rows_basis"][0], before[0]["rows_basis"][0])
        assert not torch.equal(states[0]["rows_basis"][1], before[0]["rows_basis"][1])
        assert torch.equal(carry.left[0], torch.eye(8))
        assert carry.rows[0].tolist() == carry.columns[0].tolist() == list(range(8))
        assert counts(basis, states) == [WHOLE]


def test_what_cannot_be_solved_is_not_counted_as_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A zero matrix and one of NaN beside a solver that always fails: there was nothing to keep the old basis from."""
    basis = AdaDiag(sides="two")
    patch(monkeypatch, "eigh", raises, raises)
    states = [basis.init_state(torch.empty(3, 4, 5))]
    grads = [torch.cat((torch.zeros(1, 4, 5), torch.full((1, 4, 5), torch.nan), grads_of(0, 1, (1, 4, 5))[0]))]
    with pytest.warns(UserWarning, match=r"\d bases were to be renewed"):
        assert basis.refresh(states, grads) == [None]
    assert counts(basis, states) == [WHOLE | {"refreshes": 0, "skipped": 1, "kept": 1}]


def test_averages_of_both_sides_are_of_the_same_gradients() -> None:
    """A row whose squares overflow in sum, while no column's do: neither average takes it."""
    basis = Eigenbasis()
    states = [basis.init_state(torch.empty(1, 2, 5))]
    basis.observe(states, grads_of(0, 1, (1, 2, 5)))
    before = copies(states)
    grad = torch.zeros(1, 2, 5)
    grad[0, 0] = 1.5e19
    assert (grad.mT @ grad).isfinite().all() and not (grad @ grad.mT).isfinite().all()
    basis.observe(states, [grad])
    for side in ("rows", "columns"):
        assert torch.equal(states[0][f"{side}_gram"], before[0][f"{side}_gram"])
    assert counts(basis, states)[0]["skipped"] == 1


def test_the_first_basis_is_eighs_also_when_it_comes_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A zero gradient at first does not make the identity a basis to go on from."""
    basis = Eigenbasis(solver="cholesky")
    seen: list[str] = []
    for name in ("eigh", "cholesky"):
        solve: Solver = SOLVERS[name]  # type: ignore[index]
        monkeypatch.setitem(SOLVERS, name, lambda *a, _n=name, _s=solve: (seen.append(_n), _s(*a))[1])  # type: ignore[arg-type]
    states = [basis.init_state(torch.empty(1, 4, 5))]
    for grads in ([torch.zeros(1, 4, 5)], grads_of(0, 1, (1, 4, 5)), grads_of(1, 1, (1, 4, 5))):
        basis.observe(states, grads)
        basis.refresh(states, grads)
    assert seen == ["eigh"] * 4 + ["cholesky"] * 2  # two sides each


def test_what_float32_cannot_do_float64_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fault is made up: without the shift, rounding leaves hard matrices that are not positive any more."""
    monkeypatch.setattr("selective.preconditioner.solvers.SHIFT", 0.0)
    gram = with_eigenvalues(torch.logspace(0, -10, 128), 0)
    noise = torch.randn(128, 128, generator=torch.Generator().manual_seed(1))
    turned = torch.linalg.eigh(gram)[1].flip(-1) @ torch.linalg.matrix_exp(0.005 * (noise - noise.mT))
    basis = Eigenbasis(sides="rows", solver="cholesky")
    states = [basis.init_state(torch.empty(1, 128, 128))]
    states[0]["rows_gram"].copy_(gram)
    states[0]["refreshes"].fill_(1)  # as if there had been one, so that it goes on from this basis
    for float64 in (1, 1):
        states[0]["rows_basis"].copy_(turned)
        basis.refresh(states, [torch.empty(1, 128, 128)])
        assert orthogonality(states[0]["rows_basis"]) <= 1e-5
        (report,) = counts(basis, states)
        assert (report["float64"], report["cpu"], report["kept"]) == (float64, 0, 0)
        monkeypatch.undo()  # the twin: with the shift it needs no help
