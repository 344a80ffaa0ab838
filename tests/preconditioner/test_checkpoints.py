"""A basis is saved with all other state: resume bit for bit, what is refused, adopting and leaving, copies."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from base_optimizers import BASES, build, give_grads
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transforms import FixedRotation, Turning, Unrotated, rotation

from selective import MGUP, Dense, Magma, SelectiveUpdate, base_part

SHAPES = ((12, 8), (8,), (6, 4, 3), (12, 8))


class Net(torch.nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        names = ("a", "b", "c", "d")
        for name, shape in zip(names, SHAPES, strict=True):
            setattr(self, name, torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))


def made(name: str, dtype: torch.dtype = torch.float32, **options: Any):
    net = Net(dtype)
    options = {"policy": MGUP(), "preconditioner": Turning(), "matrix_view": "experts", **options}
    if not BASES[name].momentum and options["policy"].needs() & {"momentum"}:
        options["momentum_beta"] = 0.9
    return net, SelectiveUpdate(build(BASES[name], list(net.parameters())), **options)


def train(net: Net, optimizer: SelectiveUpdate, first: int, last: int) -> None:
    params = list(net.parameters())
    for step in range(first, last):
        give_grads(params, step)
        if step < 3:
            params[3].grad = None  # its basis is younger
        optimizer.step()


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same(a: Net, b: Net) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


DTYPES = (torch.float32, torch.bfloat16)
POLICIES = (MGUP(), Dense(), Magma())
RESUMED = ("adamw-foreach", "sgd-momentum", "nadam", "adafactor", "po-lion", "optimi-adamw")


def cells() -> list[Any]:
    """All of them; in the ordinary lane a cell for each base and step, in which policies and dtypes take turns."""
    cells = []
    for i, name in enumerate(RESUMED):
        for j, at in enumerate((0, 4, 5, 6)):
            often = POLICIES[(i + j) % 3], DTYPES[(i // 3 + j) % 2]
            for policy, dtype in itertools.product(POLICIES, DTYPES):
                marks = [] if (policy, dtype) == often else [pytest.mark.slow]
                label = f"{name}-{type(policy).__name__}-{str(dtype)[6:]}-{at}"
                cells.append(pytest.param(name, policy, dtype, at, marks=marks, id=label))
    return cells


@pytest.mark.parametrize(("name", "policy", "dtype", "at"), cells())
def test_a_run_goes_on_bit_for_bit_between_refreshes(name: str, policy: Any, dtype: torch.dtype, at: int) -> None:
    preconditioner = Turning(waits=True, every=3)
    net, optimizer = made(name, dtype, policy=policy, preconditioner=preconditioner)
    train(net, optimizer, 0, at)
    saved = through_a_file({"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    train(net, optimizer, at, at + 5)
    other, resumed = made(name, dtype, policy=policy, preconditioner=preconditioner)
    other.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["optimizer"])
    if dtype == torch.bfloat16 and at:
        entries = resumed.state[other.a]
        assert entries["selective/basis/P"].dtype == torch.float32
        assert entries["selective/basis/count"].dtype == torch.int64
        assert int(entries["selective/basis_steps"]) == at
    train(other, resumed, at, at + 5)
    assert_same(net, other)


def test_a_basis_that_is_not_loaded_is_noticed() -> None:
    net, optimizer = made("adamw-foreach")
    train(net, optimizer, 0, 5)
    saved = through_a_file({"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    train(net, optimizer, 5, 7)
    other, resumed = made("adamw-foreach")
    other.load_state_dict(saved["net"])
    resumed.load_state_dict(base_part(saved["optimizer"]))
    train(other, resumed, 5, 7)
    assert not torch.equal(net.a, other.a)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
def test_distributed_checkpoints(flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    net, optimizer = made("adamw-foreach")
    train(net, optimizer, 0, 5)
    saved = through_a_file((net.state_dict(), get_optimizer_state_dict(net, optimizer, options=options)))
    train(net, optimizer, 5, 9)
    other, resumed = made("adamw-foreach")
    other.load_state_dict(saved[0])
    set_optimizer_state_dict(other, resumed, saved[1], options=options)
    train(other, resumed, 5, 9)
    assert_same(net, other)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["adamw-foreach", "nadam"])
def test_copies_step_as_the_original(way: Any, name: str) -> None:
    net, optimizer = made(name)
    train(net, optimizer, 0, 4)
    other, twin = way((net, optimizer))
    assert twin.preconditioner_groups[0].preconditioner == Turning()
    train(net, optimizer, 4, 8)
    train(other, twin, 4, 8)
    assert_same(net, other)


class Sided(Turning):
    """A kind with two layouts of its state."""

    sides: str = "two"

    def init_state(self, like):
        made = super().init_state(like)
        return made if self.sides == "one" else {**made, "second": torch.zeros_like(made["Q"])}


@pytest.mark.parametrize(
    ("theirs", "ours", "says"),
    [
        (
            {"preconditioner": Turning()},
            {"preconditioner": FixedRotation()},
            "Turning is another kind than Fixed",
        ),
        ({"preconditioner": Turning()}, {"preconditioner": None}, "has the preconditioner None .* 'a' was rotated"),
        (
            {"preconditioner": Sided()},
            {"preconditioner": Sided(sides="one")},
            r"Sided\(sides='one'\).* made with Sided\(\): of parameter 'a' it has second: 1 x 8 x 8 of float32, here",
        ),
        ({"matrix_view": "conv"}, {}, r"rotated as \(1, 6, 12\), here it would be \(6, 4, 3\)"),
        ({}, {"matrix_view": "matrices"}, "'c' was rotated, and is left alone here"),
        ({"matrix_view": "matrices"}, {}, "'c' was not rotated"),
    ],
)
def test_another_basis_is_refused_and_nothing_is_loaded(theirs: Any, ours: Any, says: str) -> None:
    net, optimizer = made("adamw-foreach", **theirs)
    train(net, optimizer, 0, 3)
    saved = through_a_file(optimizer.state_dict())
    params = list(net.named_parameters())
    options: Any = {"policy": MGUP(), "preconditioner": Turning(), "matrix_view": "experts", **ours}
    other = SelectiveUpdate(torch.optim.AdamW(params, lr=1e-2), **options)
    give_grads([p for _, p in params], 9)
    other.step()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=f"(?s){says}.*Nothing was loaded"):
        other.load_state_dict(saved)
    after = other.state_dict()
    assert after["state"].keys() == before["state"].keys()
    for index, entries in before["state"].items():
        assert all(torch.equal(value, after["state"][index][key]) for key, value in entries.items())
    other.load_state_dict(base_part(saved))  # the way out that the error names


def test_hyper_parameters_of_the_checkpoint_win() -> None:
    net, optimizer = made("adamw-foreach", preconditioner=Turning(every=2))
    train(net, optimizer, 0, 5)
    saved = through_a_file({"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    train(net, optimizer, 5, 10)
    other, resumed = made("adamw-foreach", preconditioner=Turning(every=7))
    other.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.preconditioner_groups[0].preconditioner == Turning(every=2)
    train(other, resumed, 5, 10)
    assert_same(net, other)


@pytest.mark.parametrize("source", ["base", "wrapper", "trained"])
def test_a_run_without_a_rotation_goes_on_with_one(source: str) -> None:
    """Bases start afresh, and the momentum that there is enters them: SGD, which sees no rotation, notices nothing."""
    net, plain = made("sgd-momentum", policy=Dense() if source != "wrapper" else MGUP(), preconditioner=None)
    train(net, plain, 0, 5)
    before, state = copy.deepcopy(net.state_dict()), through_a_file(plain.state_dict())
    expected, without = made("sgd-momentum", policy=Dense(), preconditioner=None)
    expected.load_state_dict(before)
    without.load_state_dict(base_part(copy.deepcopy(state)))  # loading shares memory, as torch's does
    train(expected, without, 5, 9)
    other = Net()
    other.load_state_dict(before)
    base = build(BASES["sgd-momentum"], list(other.parameters()))
    if source == "trained":
        base.load_state_dict(base_part(state))
    policy = Dense() if source != "wrapper" else MGUP()
    rotated = SelectiveUpdate(base, policy, preconditioner=FixedRotation(), matrix_view="experts")
    if source != "trained":
        rotated.load_state_dict(state if source == "wrapper" else base_part(state))
        state = rotated.state_dict()
    rotated.policy_groups[0].policy = Dense()
    train(other, rotated, 5, 9)
    for p, q in zip(other.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_the_base_part_is_what_the_plain_base_loads() -> None:
    net, optimizer = made("adamw-foreach", policy=Dense(), preconditioner=Unrotated())
    train(net, optimizer, 0, 4)
    plain = build(BASES["adamw-foreach"], list(net.parameters()))
    plain.load_state_dict(base_part(optimizer.state_dict()))
    assert set(plain.state[net.a]) == {"step", "exp_avg", "exp_avg_sq"}
    assert torch.equal(plain.state[net.a]["exp_avg"], optimizer.base.state[net.a]["exp_avg"])
    assert plain.state[net.c]["exp_avg"].shape == net.c.shape  # in the parameter's own shape


def test_the_momentum_of_a_rotated_parameter_is_saved_in_the_rotated_space() -> None:
    net, optimizer = made("adamw-foreach", policy=Dense(), preconditioner=FixedRotation())
    train(net, optimizer, 0, 1)
    grad = net.a.grad
    inside = rotation(12).T @ (0.1 * grad) @ rotation(8, 1)
    torch.testing.assert_close(optimizer.state_dict()["state"][0]["exp_avg"], inside, rtol=1e-4, atol=1e-6)


def test_state_can_be_made_before_the_first_step() -> None:
    for name in ("adamw-foreach", "nadam"):
        net, optimizer = made(name, policy=Dense())
        other, lazy = made(name, policy=Dense())
        optimizer.init_state()
        assert "selective/basis/P" in optimizer.state[net.a]
        if name == "nadam":  # which counts a step when it makes its state
            continue
        train(net, optimizer, 0, 4)
        train(other, lazy, 0, 4)
        assert_same(net, other)


def test_switching_the_policy_keeps_the_basis() -> None:
    net, optimizer = made("adamw-foreach", policy=Magma())
    train(net, optimizer, 0, 5)
    basis = optimizer.store.table[net.a]["selective/basis/P"]
    for policy in (MGUP(), Dense(), Magma()):
        optimizer.policy_groups[0].policy = policy
        train(net, optimizer, 5, 6)
        assert optimizer.store.table[net.a]["selective/basis/P"] is basis
    assert int(optimizer.state[net.a]["selective/basis_steps"]) == 8
