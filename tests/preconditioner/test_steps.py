"""A step around a basis: who is rotated, missing and broken gradients, standing still, errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from base_optimizers import BASES, build, give_grads
from transforms import FixedRotation, Turning, Unrotated

from selective import MGUP, AdaDiag, Cautious, Dense, Policy, PolicyError, PreconditionerError, SelectiveUpdate
from selective.preconditioner import Carry
from selective.rotation.rotation import Rotation

SHAPES = ((12, 8), (8,), (6, 4, 3, 3), (12, 8), (7, 5))


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def wrapped(name: str = "adamw-foreach", dtype: torch.dtype = torch.float32, **options: Any):
    params = parameters(dtype)
    return params, SelectiveUpdate(build(BASES[name], params), **{"preconditioner": Turning(), **options})


def own(optimizer: SelectiveUpdate, p: torch.Tensor) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in optimizer.state[p].items() if k.startswith("selective/basis")}


# --- which parameters ---


@pytest.mark.parametrize(
    ("view", "shapes"),
    [
        ("matrices", [(1, 12, 8), None, None, (1, 12, 8), (1, 7, 5)]),
        ("conv", [(1, 12, 8), None, (1, 6, 36), (1, 12, 8), (1, 7, 5)]),
        ("experts", [(1, 12, 8), None, (24, 3, 3), (1, 12, 8), (1, 7, 5)]),
    ],
)
def test_a_view_says_what_is_a_matrix(view: Any, shapes: list[Any]) -> None:
    params, optimizer = wrapped(matrix_view=view)
    give_grads(params, 0)
    optimizer.step()
    found = [optimizer.state[p].get("selective/basis_shape") for p in params]
    assert [None if f is None else tuple(f.tolist()) for f in found] == shapes


@pytest.mark.parametrize("view", ["conv", "experts"])
def test_a_batch_is_rotated_as_its_matrices_are_by_themselves(view: Any) -> None:
    params, optimizer = wrapped(matrix_view=view)
    weight = params[2].detach()
    pieces = [weight.reshape(6, 36)] if view == "conv" else list(weight.reshape(24, 3, 3))
    alone = [torch.nn.Parameter(x.clone()) for x in pieces]
    one_by_one = SelectiveUpdate(build(BASES["adamw-foreach"], alone), preconditioner=Turning(every=1))
    optimizer.preconditioner_groups[0]["every"] = 1
    for step in range(4):
        give_grads(params, step)
        grad = params[2].grad
        for p, g in zip(alone, [grad.reshape(6, 36)] if view == "conv" else grad.reshape(24, 3, 3), strict=True):
            p.grad = g.clone()
        optimizer.step()
        one_by_one.step()
    expected = torch.stack([p.detach() for p in alone]).reshape(weight.shape)
    torch.testing.assert_close(params[2].detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("space", ["rotated", "original"])
@pytest.mark.parametrize("name", ["adamw-foreach", "sgd-momentum", "nadam", "adafactor"])
def test_memory_may_lie_in_any_order(name: str, space: Any) -> None:
    """Channels-last and transposed parameters step as contiguous ones, whatever their gradients' layout."""
    found = []
    for other in (False, True):
        params = parameters()
        if other:
            params[2] = torch.nn.Parameter(params[2].detach().contiguous(memory_format=torch.channels_last))
            params[3] = torch.nn.Parameter(params[3].detach().t().contiguous().t())
        optimizer = SelectiveUpdate(
            build(BASES[name], params), MGUP(), preconditioner=Turning(), matrix_view="conv", mask_space=space,
            momentum_beta=None if BASES[name].momentum else 0.9,
        )  # fmt: skip
        for step in range(5):
            give_grads(params, step)
            if other:
                params[2].grad = params[2].grad.contiguous(memory_format=torch.channels_last)
            optimizer.step()
        assert params[3].is_contiguous() != other
        found.append([p.detach() for p in params])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_statistics_are_of_the_space_of_the_mask() -> None:
    for space in ("rotated", "original"):
        params, optimizer = wrapped(policy=RotatedShown(), preconditioner=FixedRotation(), mask_space=space)
        give_grads(params, 0)
        optimizer.step()
        found = optimizer.statistics()["param_groups[0][0]"]
        seen = optimizer.state[params[0]]
        u, g = seen["selective/state/update"], seen["selective/state/grad"]
        mask = (g > 0).float()
        expected = {
            "share": mask.mean(),
            "norm_before": u.norm(),
            "norm_after": (mask * u).norm(),
            "cosine": (u * g).sum() / (u.norm() * g.norm()),
        }
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    params, optimizer = wrapped(policy=MGUP(), preconditioner=FixedRotation())
    give_grads(params, 0)
    optimizer.step()
    assert float(optimizer.statistics()["param_groups[0][4]"]["share"]) == pytest.approx(17 / 35)


class RotatedShown(Policy):
    def init_state(self, view):
        return {"update": torch.zeros(view.shape), "grad": torch.zeros(view.shape)}

    def mask(self, view):
        return view.grad > 0, {"update": view.update.clone(), "grad": view.grad.clone()}


def test_what_is_not_taken_steps_as_without_bit_for_bit() -> None:
    for policy in (Dense(), MGUP()):
        for name in ("adamw-foreach", "nadam", "adafactor"):
            params, optimizer = wrapped(name, policy=policy, preconditioner=Unrotated(smallest=8))
            plain, without = wrapped(name, policy=policy, preconditioner=None)
            for step in range(5):
                give_grads(params, step)
                give_grads(plain, step)
                optimizer.step()
                without.step()
            assert [torch.equal(a, b) for a, b in zip(params, plain, strict=True)][1:3] == [True, True]
            assert torch.equal(params[4], plain[4])  # a matrix, too small to be taken
            assert not any(k.startswith("selective/basis") for k in optimizer.state[params[4]])


def test_groups_override_and_nothing_is_left_in_them() -> None:
    params = parameters()
    groups = [
        {"params": params[:1]},
        {"params": params[1:3], "preconditioner": {"kind": "Turning", "every": 2}, "matrix_view": "conv"},
        {"params": params[3:], "preconditioner": None},
    ]
    base = torch.optim.AdamW(groups)
    optimizer = SelectiveUpdate(base, preconditioner="FixedRotation")
    assert all(not {"preconditioner", "matrix_view", "policy"} & set(g) for g in base.param_groups)
    found = [group.preconditioner for group in optimizer.preconditioner_groups]
    assert found == [FixedRotation(), Turning(every=2), None]
    assert dict(optimizer.preconditioner_groups[1])["every"] == 2
    optimizer.add_param_group(
        {
            "params": [torch.nn.Parameter(torch.ones(4, 3, 2))],
            "preconditioner": FixedRotation(),
            "matrix_view": "experts",
        }
    )
    give_grads(params, 0)
    optimizer.param_groups[3]["params"][0].grad = torch.ones(4, 3, 2)
    optimizer.step()
    added = optimizer.state[optimizer.param_groups[3]["params"][0]]
    assert added["selective/basis_shape"].tolist() == [4, 3, 2]
    assert "selective/basis/L" not in optimizer.state[params[0]]
    assert "selective/basis/L" in optimizer.state[params[2]]
    assert "selective/basis_steps" not in optimizer.state[params[3]]


def test_a_group_that_cannot_be_wrapped_keeps_what_it_said() -> None:
    said = {"preconditioner": "FixedRotation", "matrix_view": "conf"}
    base = torch.optim.AdamW([{"params": parameters(), **said}])
    with pytest.raises(ValueError, match=r"matrix_view is 'conf', must be 'matrices' .*'conv' .*'experts'"):
        SelectiveUpdate(base)
    assert said.items() <= base.param_groups[0].items()


def test_wrong_arguments_say_what_to_do() -> None:
    base = torch.optim.AdamW(parameters())
    with pytest.raises(
        ValueError, match=r"preconditioner: kind 'FixedRotatio' is not known \(did you mean 'FixedRotation'"
    ):
        SelectiveUpdate(base, preconditioner="FixedRotatio")
    with pytest.raises(ValueError, match="mask_space is 'outer', must be 'rotated' or 'original'"):
        SelectiveUpdate(base, preconditioner=FixedRotation(), mask_space="outer")  # type: ignore[arg-type]
    optimizer = SelectiveUpdate(base, preconditioner=FixedRotation())
    optimizer.param_groups[0]["preconditioner"] = None
    with pytest.raises(ValueError, match=r"param_groups\[0\] got a 'preconditioner' after it was taken in"):
        optimizer.step()


def test_dtypes_that_have_no_float32_basis_are_left_alone() -> None:
    params = [torch.nn.Parameter(torch.ones(4, 4, dtype=d)) for d in (torch.float64, torch.complex64, torch.float32)]
    optimizer = SelectiveUpdate(torch.optim.AdamW(params), preconditioner=FixedRotation())
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert ["selective/basis_steps" in optimizer.state[p] for p in params] == [False, False, True]
    assert "float64, and a basis is float32" in optimizer.explain()


def test_a_sparse_gradient_of_a_rotated_parameter_is_refused_by_name() -> None:
    table = torch.nn.Embedding(9, 4, sparse=True)
    optimizer = SelectiveUpdate(torch.optim.SGD(list(table.named_parameters()), lr=0.1), preconditioner=FixedRotation())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"'weight' has a sparse gradient; .* with preconditioner None"):
        optimizer.step()


# --- in training ---


def test_a_hyper_parameter_may_move_but_not_the_basis() -> None:
    params, optimizer = wrapped()
    give_grads(params, 0)
    optimizer.step()
    optimizer.preconditioner_groups[0]["every"] = 5
    optimizer.step()
    optimizer.preconditioner_groups[0].preconditioner = FixedRotation()
    with pytest.raises(
        ValueError, match=r"preconditioner_groups\[0\] was Turning\(every=5\) and is FixedRotation\(\) now"
    ):
        optimizer.step()
    optimizer.preconditioner_groups[0].preconditioner = Turning(every=5)
    optimizer.step()
    optimizer.preconditioner_groups[0].preconditioner = None
    with pytest.raises(ValueError, match="is None now"):
        optimizer.step()


def test_the_floor_may_be_set_and_taken_away() -> None:
    params, optimizer = wrapped(preconditioner=AdaDiag(sides="two", refresh_every=1))
    for step, floor in enumerate((16.0, 0.0, 8.0)):
        optimizer.preconditioner_groups[0]["floor"] = floor
        give_grads(params, step)
        optimizer.step()
        found = [v for p in params for k, v in optimizer.state[p].items() if str(k).endswith("/noise")]
        assert found
    _, resumed = wrapped(preconditioner=AdaDiag(sides="two", refresh_every=1, floor=0))
    resumed.load_state_dict(optimizer.state_dict())


def test_a_parameter_that_is_no_matrix_any_more_is_named() -> None:
    params, optimizer = wrapped()
    give_grads(params, 0)
    optimizer.step()
    params[0].data = params[0].data.double()
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(ValueError, match=r"\(parameter .* was rotated as .* would be left alone: float64, and a basis"):
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw-foreach", "nadam", "adafactor", "po-lion"])
def test_a_gradient_may_come_late_or_not_at_all(name: str) -> None:
    """A parameter's basis counts its own steps: one that starts at step 3 does what it would have done at step 0."""
    params, optimizer = wrapped(name, preconditioner=Turning(waits=True, every=2))
    alone = [torch.nn.Parameter(params[4].detach().clone())]  # the first of one, where it was the third of three
    start = params[4].detach().clone()
    for step in range(8):
        give_grads(params, step)
        if step < 3:
            params[4].grad = None
        params[3].grad = None
        optimizer.step()
        if step == 3:
            assert torch.equal(params[4], start)  # its first step makes its basis
    assert int(optimizer.state[params[4]]["selective/basis_steps"]) == 5
    assert "selective/basis_steps" not in optimizer.state[params[3]]
    other = SelectiveUpdate(build(BASES[name], alone), preconditioner=Turning(waits=True, every=2))
    for step in range(3, 8):
        give_grads(params, step)
        alone[0].grad = params[4].grad.clone()
        other.step()
    assert int(optimizer.state[params[4]]["selective/basis/count"]) == 3
    torch.testing.assert_close(params[4].detach(), alone[0].detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("policy", [Dense(), MGUP()], ids=["dense", "mgup"])
@pytest.mark.parametrize("name", ["adamw-foreach", "sgd-momentum", "nadam", "adafactor", "optimi-adamw", "po-lion"])
def test_who_stands_still_only_makes_a_basis(name: str, policy: Policy) -> None:
    params, optimizer = wrapped(name, policy=policy, preconditioner=Turning(waits=True))
    plain, without = wrapped(name, policy=policy, preconditioner=None)
    before = [p.detach().clone() for p in params]
    for step in range(3):
        give_grads(params, step)
        give_grads(plain, step)
        grads = [p.grad.clone() for p in params]
        optimizer.step()
        without.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))
        assert torch.equal(params[1], plain[1])  # not rotated: steps as ever
        moved = [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]
        rotated = [0, 3, 4]
        assert [moved[i] for i in rotated] == [step > 0] * 3
        for i in rotated:
            assert bool(optimizer.base.state.get(params[i])) == (step > 0 or name == "sgd")
            assert int(optimizer.state[params[i]]["selective/basis/count"]) >= 1
            assert int(optimizer.state[params[i]]["selective/basis_steps"]) == step + 1


def known_on_the_host(rotation: Rotation, due: list[int], states: list[Any]) -> dict[int, bool]:
    """As on a GPU, where a state has counters that live on the CPU."""
    return {i: bool(rotation._finite[i]) for i in due}


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_no_basis(bad: float, on_host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if on_host:
        monkeypatch.setattr(Rotation, "_finite_on_host", known_on_the_host)
    params, optimizer = wrapped(preconditioner=Turning(every=1))  # refuses NaN by itself
    for step in range(3):
        give_grads(params, step)
        optimizer.step()
    before, other = own(optimizer, params[0]), own(optimizer, params[3])
    give_grads(params, 3)
    params[0].grad[2, 1] = bad
    optimizer.step()
    after = own(optimizer, params[0])
    for key in ("P", "Q", "count"):
        assert torch.equal(after[f"selective/basis/{key}"], before[f"selective/basis/{key}"])
    as_of_zeros = before["selective/basis/L"].lerp(torch.zeros(12, 12), 0.1)
    assert torch.equal(after["selective/basis/L"], as_of_zeros)
    assert not torch.equal(own(optimizer, params[3])["selective/basis/P"], other["selective/basis/P"])
    statistics = optimizer.statistics()
    assert float(statistics["param_groups[0][0]"]["basis_skipped"]) == 1
    assert float(statistics["param_groups[0][3]"]["basis_skipped"]) == 0
    assert float(statistics["param_groups[0][3]"]["refreshes"]) == 4


class Unread(Turning):
    """Observes, but not the gradients."""

    def observes(self):
        return False

    def observe(self, states, grads):
        for s in states:
            s["count"].add_(100)

    def is_due(self, steps, place, count):
        return False


def test_gradients_that_nobody_reads_are_not_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def looks(*args: Any) -> None:
        raise AssertionError("looked")

    params, optimizer = wrapped(preconditioner=Unread())
    give_grads(params, 0)
    with monkeypatch.context() as patch:
        patch.setattr("selective.rotation.rotation.Rotation._check_finite", looks)
        optimizer.step()
    assert int(optimizer.state[params[0]]["selective/basis/count"]) == 100


@pytest.mark.parametrize("way", ["skip", "raise"])
def test_a_step_that_is_not_taken_moves_no_basis(way: Any) -> None:
    params, optimizer = wrapped(preconditioner=Turning(every=1), on_nonfinite=way)
    give_grads(params, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    params[1].grad[0] = float("nan")
    if way == "raise":
        with pytest.raises(FloatingPointError):
            optimizer.step()
    else:
        optimizer.step()
    after = optimizer.state_dict()
    for index, entries in before["state"].items():
        assert all(torch.equal(value, after["state"][index][key]) for key, value in entries.items())


# --- errors ---


class Breaks(Turning):
    """RotatedRaises where it is told to, half-way through."""

    where: str = "refresh"
    from_step: int = 2

    def _break(self, where, states):
        if where == self.where and int(states[0]["count"]) >= self.from_step:
            states[0]["P"].fill_(7.0) if where == "refresh" else None
            raise ArithmeticError("no luck")

    def refresh(self, states, grads):
        self._break("refresh", states)
        return super().refresh(states, grads)

    def observe(self, states, grads):
        super().observe(states, grads)
        self._break("observe", states)

    def project_in(self, states, xs):
        self._break("project_in", states)
        return super().project_in(states, xs)

    def project_out(self, states, xs):
        self._break("project_out", states)
        return super().project_out(states, xs)


@pytest.mark.parametrize("where", ["refresh", "observe", "project_in", "project_out"])
@pytest.mark.parametrize("name", ["adamw-foreach", "nadam", "adafactor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_preconditioner_that_raises_leaves_parameters_alone(name: str, where: str, dtype: torch.dtype) -> None:
    params, optimizer = wrapped(name, dtype, policy=Cautious(), preconditioner=Breaks(where=where, every=1))
    breaks_in = 2 if where == "refresh" else 1
    for step in range(breaks_in + 1):
        give_grads(params, step)
        before, grads = [p.detach().clone() for p in params], [p.grad for p in params]
        bases = [own(optimizer, p) for p in params]
        if step < breaks_in:
            optimizer.step()
    with pytest.raises(PreconditionerError, match=rf"in step {breaks_in}, Breaks.{where} failed: no luck") as caught:
        optimizer.step()
    assert isinstance(caught.value.__cause__, ArithmeticError)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert all(p.grad is g and p.dtype == dtype for p, g in zip(params, grads, strict=True))
    if where == "refresh":  # of the first batch: nothing at all has moved
        for p, basis in zip(params, bases, strict=True):
            assert all(torch.equal(v, basis[k]) for k, v in own(optimizer, p).items())


class RotatedRaises(Policy):
    def mask(self, view):
        if view.step == 2:
            raise ZeroDivisionError("by hand")
        return view.grad > 0


@pytest.mark.parametrize("space", ["rotated", "original"])
@pytest.mark.parametrize("name", ["adamw-foreach", "nadam", "adafactor"])
def test_a_policy_that_raises_leaves_parameters_alone(name: str, space: Any) -> None:
    params, optimizer = wrapped(name, policy=RotatedRaises(), mask_space=space)
    for step in range(3):
        give_grads(params, step)
        before = [p.detach().clone() for p in params]
        if step == 2:
            with pytest.raises(PolicyError, match="RotatedRaises failed in step 2: by hand"):
                optimizer.step()
        else:
            optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


class Careless(FixedRotation):
    what: str = "shape"

    def project_in(self, states, xs):
        if self.what == "itself":
            return list(xs)
        return [x.mT for x in xs]

    def project_out(self, states, xs):
        return list(xs)

    def is_due(self, steps, place, count):
        return True

    def refresh(self, states, grads):
        if self.what == "replaced":
            states[0]["P"] = states[0]["P"].clone()
        return [None] * (len(states) - (self.what == "short")) if self.what != "junk" else [3] * len(states)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("shape", "project_in failed: it returned"),
        ("replaced", "put another tensor into a state"),
        ("short", "one entry for each of 2 states"),
        ("junk", "a Carry or None"),
    ],
)
def test_what_does_not_fit_is_said(what: str, says: str) -> None:
    params, optimizer = wrapped(preconditioner=Careless(what=what))
    give_grads(params, 0)
    with pytest.raises(PreconditionerError, match=says):
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw-foreach", "nadam", "adafactor"])
def test_handing_back_an_argument_does_no_harm(name: str) -> None:
    """project_in is to return new tensors; the parameter and its gradient are safe from one that does not."""
    params, optimizer = wrapped(name, preconditioner=Careless(what="itself"))
    others, plain = wrapped(name, preconditioner=Unrotated())
    for step in range(3):
        give_grads(params, step)
        give_grads(others, step)
        grads = [p.grad.clone() for p in params]
        optimizer.step()
        plain.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


def test_a_base_that_raises_leaves_parameters_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nadam", "adafactor"):
        params, optimizer = wrapped(name, torch.bfloat16)
        give_grads(params, 0)
        optimizer.step()
        before, grads = [p.detach().clone() for p in params], [p.grad for p in params]

        def broken(*args: Any, **kwargs: Any) -> None:
            raise ArithmeticError("no luck")

        with monkeypatch.context() as patch:
            patch.setattr("selective.step.run.run_step_on", broken)
            with pytest.raises(ArithmeticError, match="no luck"):
                optimizer.step()
        assert all(torch.equal(p, b) and p.dtype == b.dtype for p, b in zip(params, before, strict=True))
        assert all(p.grad is g for p, g in zip(params, grads, strict=True))
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw-foreach", "sgd-momentum", "nadam", "adafactor"])
def test_a_preconditioner_of_ours_keeps_no_copies_and_steps_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only somebody else's code costs a copy of the parameters; the step is the same, bit for bit."""
    found = []
    for foreign in (True, False):
        monkeypatch.setattr("selective.capture.rotated.is_foreign", lambda p, foreign=foreign: foreign)
        params, optimizer = wrapped(name, policy=MGUP())
        for step in range(4):
            give_grads(params, step)
            optimizer.step()
        found.append([p.detach() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["adamw-foreach", "nadam", "po-lamb"])  # Adafactor's own step has a product in it
def test_an_autocast_region_around_a_step_makes_no_difference(name: str) -> None:
    found = []
    for enabled in (False, True):
        params, optimizer = wrapped(name, policy=Cautious(), matrix_view="conv")
        for step in range(4):
            give_grads(params, step)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                optimizer.step()
        found.append([p.detach() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_dense_group_that_is_rotated_as_a_whole_does_not_step_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """... and keeps what the base keeps in a group: Lion's count of steps."""
    p = [torch.nn.Parameter(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)))]
    optimizer = SelectiveUpdate(build(BASES["po-lion"], p), preconditioner=Turning())

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the base was stepped")

    monkeypatch.setattr("selective.step.run.run_step_on", never)
    for step in range(3):
        give_grads(p, step)
        optimizer.step()
    assert optimizer.param_groups[0]["step"] == 3
    p[0].grad = None
    monkeypatch.undo()
    optimizer.step()  # now there is nothing that is rotated, and the base has its way
    assert optimizer.param_groups[0]["step"] == 4


def test_large_lists_are_worked_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for part in (1, 2**26):
        monkeypatch.setattr("selective.foreach.PART", part)
        monkeypatch.setattr("selective.rotation.rotation.ROTATED", part)
        params, optimizer = wrapped("adamw-foreach", policy=MGUP())
        for step in range(4):
            give_grads(params, step)
            optimizer.step()
        found.append([p.detach() for p in params])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_small_updates_arrive_by_stochastic_rounding() -> None:
    for stochastic in (False, True):
        p = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        base = torch.optim.SGD([p], lr=1e-4)
        optimizer = SelectiveUpdate(base, preconditioner=FixedRotation(), stochastic_rounding=stochastic)
        for _ in range(20):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved = 1 - p.detach().double().mean().item()
        # 4,096 elements, each some 20 × 1e-4 / 2^-8 times up or down: the mean is off by 1 % of 2^-8 at most, often
        assert abs(moved - 20e-4) < 2e-4 if stochastic else moved == 0


# --- bases ---


@pytest.mark.parametrize("name", ["muon", "soap"])
def test_a_base_that_rotates_warns_once(name: str) -> None:
    import pytorch_optimizer

    make = torch.optim.Muon if name == "muon" else pytorch_optimizer.SOAP
    p = [torch.nn.Parameter(torch.ones(8, 8))]
    with pytest.warns(UserWarning, match="rotates or orthogonalises gradients itself") as caught:
        optimizer = SelectiveUpdate(make(p, lr=0.01), preconditioner=FixedRotation())
    assert len(caught) == 1
    p[0].grad = torch.eye(8)
    optimizer.step()
    SelectiveUpdate(make(p, lr=0.01))  # and not without a preconditioner


@pytest.mark.parametrize("name", [n for n in BASES if n not in ("muon",)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_base_steps(name: str, dtype: torch.dtype) -> None:
    with torch.compiler.set_stance("force_eager"):
        generator = torch.Generator().manual_seed(0)
        shapes = [(64, 64), (8,), (6, 5)]
        params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
        before = [p.detach().clone() for p in params]
        optimizer = SelectiveUpdate(build(BASES[name], params), policy=Cautious(), preconditioner=Turning(every=2))
        for step in range(5):
            give_grads(params, step)
            optimizer.step()
        assert all(torch.isfinite(p).all() and not torch.equal(p, b) for p, b in zip(params, before, strict=True))
        assert all(p.dtype == dtype for p in params)


def test_second_moments_follow_an_order() -> None:
    """They do if the preconditioner says that the new basis is the old one in another order."""
    for name, keys in (("adam-amsgrad", ["exp_avg_sq", "max_exp_avg_sq"]), ("adafactor", ["row_var", "col_var"])):
        params, optimizer = wrapped(name, preconditioner=Shuffles())
        for step in range(4):
            give_grads(params, step)
            if step == 3:
                for p in params:
                    p.grad.zero_()
            before = {k: optimizer.base.state[params[0]][k].clone() for k in keys} if step == 3 else {}
            optimizer.step()
        for key, old in before.items():
            new = optimizer.base.state[params[0]][key]
            rows = old.flip(0) if old.shape[0] > 1 else old
            expected = rows.roll(1, 1) if old.shape[1] > 1 else rows
            factor = new.flatten()[0] / expected.flatten()[0]  # the moment has decayed, evenly
            torch.testing.assert_close(new, factor * expected, rtol=1e-5, atol=1e-7)


class Shuffles(Turning):
    """Only another order, at step 3."""

    def is_due(self, steps, place, count):
        return steps == 3

    def refresh(self, states, grads):
        made = []
        for g in grads:
            rows = torch.arange(g.shape[1]).flip(0).repeat(g.shape[0], 1)
            columns = torch.arange(g.shape[2]).roll(1).repeat(g.shape[0], 1)
            made.append(Carry(None, None, rows, columns))
        return made
