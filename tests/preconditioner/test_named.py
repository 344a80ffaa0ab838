"""Soap and AdaDiag: data that goes to JSON and back, prints as written, and follows the papers' rules."""

from __future__ import annotations

import json
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import F64, apart, orthogonal
from torch import Tensor
from transcribed_rotations import AdaDiagRule, SoapRule

import selective
from selective import AdaDiag, Eigenbasis, Soap
from selective.preconditioner import Carry, Preconditioner, preconditioner_from

EPS = torch.finfo(torch.float32).eps
KINDS: list[type[Eigenbasis]] = [Eigenbasis, AdaDiag, Soap]


def a_field(field: Any) -> st.SearchStrategy[Any]:
    if get_origin(field.annotation) is Literal:
        return st.sampled_from(get_args(field.annotation))
    if field.annotation is bool:
        return st.booleans()
    if field.annotation is int:
        return st.integers(2, 10**9)
    if field.annotation == float | None:
        return st.floats(0, 100, exclude_min=True) | st.none()
    return st.floats(0, 1, exclude_max=True)


def consistent(fields: dict[str, Any], kind: type[Eigenbasis]) -> bool:
    """The two rules between fields."""
    get = {name: fields.get(name, field.default) for name, field in kind.model_fields.items()}
    return not get["skip_first_step"] or (get["statistic"] == "ema" and get["start_step"] <= 1)


def members(kind: type[Eigenbasis]) -> st.SearchStrategy[Eigenbasis]:
    fields = {name: a_field(field) for name, field in kind.model_fields.items()}
    chosen = st.fixed_dictionaries({}, optional=fields).filter(lambda f: consistent(f, kind))
    return chosen.map(lambda f: kind(**f))


@settings(max_examples=100)
@given(st.sampled_from(KINDS).flatmap(members))
def test_json_and_back_and_printed_as_written(member: Eigenbasis) -> None:
    again = preconditioner_from(member.model_dump_json())
    assert type(again) is type(member) and again == member
    assert preconditioner_from(member.model_dump()) == member
    assert json.loads(member.model_dump_json())["kind"] == type(member).__name__
    printed = eval(repr(member), {kind.__name__: kind for kind in KINDS})
    assert printed == member and repr(printed) == repr(member)
    assert hash(member) == hash(member.model_copy())


def test_names() -> None:
    assert {kind.kind for kind in KINDS} <= set(Preconditioner._registry)
    assert {kind.__name__ for kind in KINDS} <= set(selective.__all__)
    assert preconditioner_from("Soap") == Soap() and preconditioner_from(None) is None
    assert repr(Soap()) == "Soap()"
    assert repr(AdaDiag(sides="two", carry="keep")) == "AdaDiag(sides='two', carry='keep')"
    assert preconditioner_from("soap") == Soap() and preconditioner_from("ADADIAG") == AdaDiag()
    assert preconditioner_from("AdaDiag++") == AdaDiag(sides="two")
    assert preconditioner_from({"kind": "adadiag++", "refresh_every": 7}) == AdaDiag(sides="two", refresh_every=7)
    with pytest.raises(ValueError, match=r"kind 'soapp' is not known \(did you mean 'Soap'\?\)"):
        preconditioner_from("soapp")
    assert preconditioner_from({"kind": "adadiag++", "sides": "one"}) == AdaDiag()  # what is written wins


def test_the_papers_settings() -> None:
    soap, one = Soap(), AdaDiag()
    assert (soap.sides, soap.statistic, soap.beta, soap.refresh_every) == ("two", "ema", 0.95, 10)
    assert (soap.carry, soap.skip_first_step, soap.stagger) == ("squared", True, False)
    assert (one.sides, one.statistic, one.refresh_every, one.stagger) == ("one", "gradient", 200, False)
    assert [Soap().stands_still(step) for step in range(3)] == [True, False, False]
    assert not AdaDiag().stands_still(0) and not Eigenbasis().stands_still(0)


def test_the_defaults_are_the_fastest_setting_and_one_gradient_is_rotated_in_float32() -> None:
    for space in (Soap(), Eigenbasis()):
        assert (space.solver, space.stagger, space.precision) == ("cholesky", False, "tf32")
    assert (AdaDiag().solver, AdaDiag().precision) == ("eigh", "float32")
    space = Eigenbasis(statistic="gradient")
    assert space.precision == "float32"
    assert repr(space) == "Eigenbasis(statistic='gradient')"
    assert Eigenbasis.from_saved(space.to_saved()) == space
    for read in (Eigenbasis.from_saved(space.to_saved()), AdaDiag.from_saved(AdaDiag().to_saved())):
        read.as_if_written()
        assert not read.model_fields_set - {"statistic"}
    written = Eigenbasis(statistic="gradient", precision="tf32")
    read = Eigenbasis.from_saved(written.to_saved())
    read.as_if_written()
    assert written.precision == read.precision == "tf32"
    assert repr(read) == repr(written)


def test_a_checkpoint_goes_on_with_the_settings_that_it_was_written_with() -> None:
    """All settings are in it, so that another default does not reach it."""
    before = Eigenbasis(stagger=True, solver="qr", precision="float32")
    text = before.to_saved()
    assert {"stagger", "solver", "precision"} <= json.loads(text).keys()
    assert Eigenbasis.from_saved(text) == before


@pytest.mark.parametrize(
    "kind,options,parts",
    [
        (Eigenbasis, {"sides": "both"}, ["sides", "'one', 'two', 'rows', 'columns' or 'unsharded'", "'both'"]),
        (Soap, {"solver": "lu"}, ["solver", "'eigh', 'svd', 'qr' or 'cholesky'", "'lu'"]),
        (AdaDiag, {"carry": "drop"}, ["carry", "'squared', 'rotate' or 'keep'"]),
        (Eigenbasis, {"precision": "float16"}, ["precision", "'float32', 'tf32' or 'bfloat16'"]),
        (Eigenbasis, {"refresh_every": 0}, ["refresh_every", "greater than or equal to 1"]),
        (Eigenbasis, {"beta": 1}, ["beta", "less than 1"]),
        (Eigenbasis, {"max_dim": 1}, ["max_dim", "greater than or equal to 2"]),
        (Eigenbasis, {"floor": -1}, ["floor", "greater than or equal to 0"]),
        (Eigenbasis, {"floor": float("nan")}, ["floor", "finite"]),
        (Soap, {"max_dims": 5}, ["max_dims", "unknown key; Soap has sides, statistic"]),
        (AdaDiag, {"skip_first_step": True}, ["leave skip_first_step out, or take statistic='ema'"]),
        (Soap, {"start_step": 100}, ["start_step=100", "leave one of the two out"]),
    ],
)
def test_errors_say_what_to_do(kind: type[Eigenbasis], options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        kind(**options)
    with pytest.raises(ValueError):
        preconditioner_from({"kind": kind.kind, **options})
    for part in parts:
        assert part in str(caught.value)
    with pytest.raises(AttributeError, match="frozen"):
        kind().sides = "two"


class Adam:
    """Dense Adam in float64 on what the preconditioner gives it, with moments that follow a carry as base.py says."""

    def __init__(self, shape: tuple[int, int], betas: tuple[float, float], eps: float = 1e-8) -> None:
        self.betas, self.eps, self.time = betas, eps, 0
        self.m, self.v = torch.zeros(shape, dtype=F64), torch.zeros(shape, dtype=F64)

    def carry(self, carry: Carry | None) -> None:
        if carry is None:
            return
        squared = carry.rows is None and carry.columns is None
        if carry.left is not None:
            self.m = carry.left[0].to(F64) @ self.m
            self.v = carry.left[0].to(F64) ** 2 @ self.v if squared else self.v
        if carry.right is not None:
            self.m = self.m @ carry.right[0].to(F64)
            self.v = self.v @ carry.right[0].to(F64) ** 2 if squared else self.v
        if carry.rows is not None:
            self.v = self.v[carry.rows[0]]
        if carry.columns is not None:
            self.v = self.v[:, carry.columns[0]]

    def update(self, grad: Tensor) -> Tensor:
        self.time += 1
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * grad.to(F64)
        self.v = b2 * self.v + (1 - b2) * grad.to(F64) ** 2
        return self.m / (1 - b1**self.time) / ((self.v / (1 - b2**self.time)).sqrt() + self.eps)


def stepped(basis: Eigenbasis, state: Any, adam: Adam, steps: int, grad: Tensor) -> Tensor | None:
    """One step in the order of docs/how-it-works/step.md, for one matrix: the update, or None where nothing moves."""
    states, grads = [state], [grad.float()[None]]
    update = None
    if basis.is_due(steps, 0, 1):
        adam.carry(basis.refresh(states, grads)[0])
    if not basis.stands_still(steps):
        (rotated,) = basis.denoise(states, basis.project_in(states, grads))
        (out,) = basis.project_out(states, [adam.update(rotated[0]).float()[None]])
        update = out[0].to(F64)
    basis.observe(states, grads)
    return update


class Valley:
    """Gradients A Aᵀ W BᵀB plus noise A N Bᵀ, the same for everyone: eigenvalues are a factor of 2 and more apart."""

    def __init__(self, rows: int, columns: int) -> None:
        self.a, self.b = (
            orthogonal(n, n) * 1.4 ** -torch.arange(n, dtype=F64) @ orthogonal(n, n + 1).mT for n in (rows, columns)
        )
        generator = torch.Generator().manual_seed(4)
        self.start = torch.randn(rows, columns, dtype=F64, generator=generator)
        self.noise = torch.randn(50, rows, columns, dtype=F64, generator=generator)

    def grad(self, weights: Tensor, step: int) -> Tensor:
        return self.a @ (self.a.mT @ weights @ self.b + 3 * self.noise[step]) @ self.b.mT


@pytest.mark.parametrize("every", [1, 5, 10])
@pytest.mark.parametrize("solver", ["qr", "cholesky"])
def test_soap_follows_its_rule_for_fifty_steps(solver: Any, every: int) -> None:
    """Statistics, bases and weights, each run on its own from its own gradients.

    Statistics are averages of float32 products, a few eps of their size. Directions of averages with eigenvalues this
    far apart are as good as that. Rotated elements are off by eps of ‖g‖, which Adam magnifies by ‖g‖/|gᵢⱼ|: for
    the small ones of 30, some 1e3.
    """
    valley, soap = Valley(6, 5), Soap(refresh_every=every, solver=solver, carry="rotate")
    theirs = SoapRule(valley.start, rate=0.01, every=every)
    ours, adam = valley.start, Adam((6, 5), (0.95, 0.95))
    state = soap.init_state(torch.empty(1, 6, 5))
    refreshed = []
    for step in range(50):
        before = int(state["refreshes"])
        update = stepped(soap, state, adam, step, valley.grad(ours, step))
        theirs.step(valley.grad(theirs.weights, step))
        assert (update is None) is (step == 0)
        ours = ours if update is None else ours - 0.01 * update
        refreshed += [step] if int(state["refreshes"]) > before else []
        for side, gram in zip(("rows", "columns"), theirs.grams, strict=True):
            assert (state[f"{side}_gram"][0] - gram).norm() <= 32 * EPS * gram.norm()
        assert (ours - theirs.weights).norm() <= 1e3 * EPS * 0.01 * (step + 1)
    assert refreshed == [1, *range(1 + every, 50, every)]
    state_again = {name: value.clone() for name, value in state.items()}
    soap.refresh([state_again], [torch.empty(1, 6, 5)])
    if 49 % every:
        theirs._refresh()  # now both have, after step 49
    for side, basis in zip(("rows", "columns"), theirs.bases, strict=True):
        assert apart(state_again[f"{side}_basis"], basis[None]) <= 64 * EPS
    assert (theirs.weights - valley.start).norm() > 0.1  # it went somewhere


def test_soap_without_the_permutation_or_the_carry_is_another_rule() -> None:
    """The twins of the test above: each part of the rule is seen by it."""
    valley = Valley(6, 5)
    theirs = SoapRule(valley.start, rate=0.01, every=5)
    for step in range(50):
        theirs.step(valley.grad(theirs.weights, step))
    for change in ("no permutation", "squared carry", "no carry", "moves at once", "other beta"):
        soap = Soap(
            refresh_every=5,
            carry={"no carry": "keep", "squared carry": "squared"}.get(change, "rotate"),
            skip_first_step=change != "moves at once",
            beta=0.9 if change == "other beta" else 0.95,
        )
        adam, ours = Adam((6, 5), (0.95, 0.95)), valley.start
        if change == "no permutation":
            carry = adam.carry
            places = [torch.arange(n)[None] for n in (6, 5)]
            adam.carry = lambda c, carry=carry, ps=places: carry(c and Carry(c.left, c.right, *ps))  # type: ignore[method-assign]
        state = soap.init_state(torch.empty(1, 6, 5))
        for step in range(50):
            update = stepped(soap, state, adam, step, valley.grad(ours, step))
            ours = ours if update is None else ours - 0.01 * update
        assert (ours - theirs.weights).norm() > 100 * 1e3 * EPS * 0.01 * 50, change


@pytest.mark.parametrize("solver", ["qr", "cholesky"])
def test_one_refresh_from_the_same_basis_is_soaps(solver: Any) -> None:
    """The basis and statistics injected, so that nothing but one power step is compared: to eps · λ₁/λₙ, 2^5 here."""
    valley, rule = Valley(6, 5), SoapRule(torch.zeros(6, 5, dtype=F64), rate=0.0)
    rule.bases = [orthogonal(6, 7), orthogonal(5, 8)]
    rule.grams = [
        valley.a.mT @ valley.a + 0.02 * torch.eye(6, dtype=F64),
        valley.b.mT @ valley.b + 0.02 * torch.eye(5, dtype=F64),
    ]
    rule.v = torch.arange(30, dtype=F64).reshape(6, 5)
    soap, adam = Soap(solver=solver, carry="rotate"), Adam((6, 5), (0.95, 0.95))
    adam.v = rule.v
    state = soap.init_state(torch.empty(1, 6, 5))
    state["refreshes"].fill_(1)
    for side, basis, gram in zip(("rows", "columns"), rule.bases, rule.grams, strict=True):
        state[f"{side}_basis"].copy_(basis)
        state[f"{side}_gram"].copy_(gram)
    adam.carry(soap.refresh([state], [torch.empty(1, 6, 5)])[0])
    rule._refresh()
    for side, basis in zip(("rows", "columns"), rule.bases, strict=True):
        assert apart(state[f"{side}_basis"], basis[None]) <= 4 * EPS * 2**5
    assert torch.equal(adam.v, rule.v)


@pytest.mark.parametrize("solver", ["svd", "eigh"])
@pytest.mark.parametrize("sides", ["rows", "two"])
def test_adadiag_with_kept_moments_follows_the_papers(sides: Any, solver: Any) -> None:
    """On the same bases, which are checked to be the gradient's own: 50 steps, refreshed every 20.

    In a two-sided refresh's step the paper's exact products would be 0 off the diagonal, and float64 ones with a
    float32 basis are rounding; there both leave out what is below the floor. With rows alone no floor is needed.
    """
    valley, two = Valley(5, 6), sides == "two"
    basis = AdaDiag(sides=sides, solver=solver, carry="keep", refresh_every=20, floor=16 if two else 0)
    adam, theirs = Adam((5, 6), (0.9, 0.999)), AdaDiagRule(valley.start, rate=0.01)
    ours, state = valley.start, basis.init_state(torch.empty(1, 5, 6))
    for step in range(50):
        grad = valley.grad(theirs.weights, step).float()  # the same for both, so that nothing is fed back
        update = stepped(basis, state, adam, step, grad)
        assert update is not None
        ours = ours - 0.01 * update
        p, q = state["rows_basis"][0], state["columns_basis"][0] if two else None
        refreshed = step % 20 == 0
        if refreshed:
            # eigh of the Gram matrix knows vectors to eps · (σ₁/σ)², 2^8 and less here.
            assert theirs.is_of(grad, p, q) <= EPS * (16 if solver == "svd" else 2**8)
        sigma = float(torch.linalg.matrix_norm(grad.to(F64), 2))
        theirs.step(grad, p, q, floor=16 * EPS * sigma if refreshed and two else 0.0)
        # Bases are the same, so what is left are the roundings of two products in and two out, of 6 terms each.
        assert (ours - theirs.weights).norm() <= 32 * EPS * 0.01 * (step + 1)
    assert int(state["refreshes"]) == 3
    assert (theirs.weights - valley.start).norm() > 0.1
