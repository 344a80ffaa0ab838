"""Faults that were found once: each with what it took to see it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import pytorch_optimizer as po
import torch
import transformers
from torch import nn
from transforms import FixedRotation

from selective import MGUP, AdaDiag, Eigenbasis, SelectiveUpdate, Soap, param_groups_for
from selective.base.base_facts import measured_moments


def made(shape: Any = (16, 12), seed: int = 0) -> tuple[nn.Parameter, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(shape, generator=generator)), torch.randn(shape, generator=generator)


def noisy(direction: torch.Tensor, step: int) -> torch.Tensor:
    return direction + 0.3 * torch.randn(direction.shape, generator=torch.Generator().manual_seed(100 + step))


BUFFERS = {
    "hf": (lambda p: transformers.Adafactor(p, relative_step=False, lr=1e-3, beta1=0.9), ["exp_avg"]),
    "came": (lambda p: po.CAME(p, lr=1e-3), ["exp_avg"]),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9), ["momentum_buffer"]),
    "ademamix": (lambda p: po.AdEMAMix(p, lr=1e-3), ["exp_avg", "exp_avg_slow"]),
    "nadam": (lambda p: torch.optim.NAdam(p, lr=1e-3), ["exp_avg"]),
    "adagrad": (lambda p: torch.optim.Adagrad(p, lr=1e-3), []),
    "adafactor": (lambda p: torch.optim.Adafactor(p, lr=1e-3), []),
}  # fmt: skip


@pytest.mark.parametrize("name", BUFFERS)
@pytest.mark.parametrize("preconditioner", [AdaDiag(refresh_every=5), Soap(refresh_every=5)], ids=repr)
def test_every_buffer_that_is_linear_in_the_gradient_is_carried(name: str, preconditioner) -> None:
    """The buffer, projected out, keeps its direction over a refresh: it moves by one gradient only."""
    make, keys = BUFFERS[name]
    p, direction = made()
    optimizer = SelectiveUpdate(make([p]), preconditioner=preconditioner)
    assert measured_moments(optimizer.base, optimizer.param_groups[0]).first == set(keys)

    def projected_out(key: str) -> torch.Tensor:
        state = [{k.removeprefix("selective/basis/"): v for k, v in optimizer.state[p].items() if "basis/" in str(k)}]
        return preconditioner.project_out(state, [optimizer.base.state[p][key].float()[None]])[0]

    for step in range(5):
        p.grad = noisy(direction, step)
        optimizer.step()
    before = {key: projected_out(key) for key in keys}
    p.grad = noisy(direction, 5)
    optimizer.step()  # refreshes
    for key in keys:
        assert torch.cosine_similarity(before[key].flatten(), projected_out(key).flatten(), 0) > 0.9, key


def test_a_centred_variance_is_refused() -> None:
    p, _ = made()
    with pytest.raises(ValueError, match=r"centered=True.*take centered=False"):
        SelectiveUpdate(torch.optim.RMSprop([p], centered=True), preconditioner=AdaDiag())
    SelectiveUpdate(torch.optim.RMSprop([p], centered=True), policy=MGUP(), momentum_beta=0.9)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
def test_the_floor_of_gradients_does_not_reach_parameters(scale: float) -> None:
    """Adafactor steps by its parameter's norm, whatever size the gradient has."""
    moved = []
    for floor in (16.0, 0.0):
        p, direction = made((32, 48))
        p.data *= 0.02
        before = p.detach().clone()
        optimizer = SelectiveUpdate(torch.optim.Adafactor([p], lr=1e-2), preconditioner=AdaDiag(floor=floor))
        p.grad = direction * scale
        optimizer.step()
        moved.append(float((p.detach() - before).norm()))
    assert moved[0] == pytest.approx(moved[1], rel=0.05)  # of what the floor takes from the gradient itself


@pytest.mark.parametrize("error", [torch.linalg.LinAlgError, RuntimeError])  # pyright: ignore
@pytest.mark.parametrize(
    ("shape", "sides"), [((8, 16), "two"), ((16, 8), "rows"), ((8, 16), "columns"), ((2, 8, 16), "two")]
)
def test_a_solver_that_raises_goes_on_in_float64(monkeypatch, shape, sides, error) -> None:
    real = torch.linalg.svd

    def failing(x, *rest, **named):
        if x.dtype == torch.float32:
            raise error("no")
        return real(x, *rest, **named)

    monkeypatch.setattr(torch.linalg, "svd", failing)
    p, direction = made(shape)
    space = AdaDiag(sides=sides, solver="svd")
    view = "matrices" if len(shape) == 2 else "experts"
    optimizer = SelectiveUpdate(torch.optim.AdamW([p]), policy=MGUP(), preconditioner=space, matrix_view=view)
    p.grad = direction
    optimizer.step()
    (said,) = optimizer.statistics().values()
    assert (said["float64"], said["kept"]) == (1 if len(shape) == 2 else 2, 0)


def test_no_memory_is_no_matter_of_the_matrix(monkeypatch) -> None:
    def failing(x, *rest, **named):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    p, direction = made()
    optimizer = SelectiveUpdate(torch.optim.AdamW([p]), preconditioner=AdaDiag())
    p.grad = direction
    with pytest.raises(RuntimeError, match="no memory"):
        optimizer.step()


def change(name: str, value: Any):
    return lambda optimizer: setattr(optimizer.preconditioner_groups[0], name, value)


def number(name: str, value: Any):
    return lambda optimizer: optimizer.preconditioner_groups[0].__setitem__(name, value)


@pytest.mark.parametrize(
    ("preconditioner", "changed", "shape", "view"),
    [
        (Soap(), number("max_dim", 20), (24, 12), "matrices"),
        (Soap(max_dim=20), number("max_dim", 10_000), (24, 12), "matrices"),
        (AdaDiag(refresh_every=2), change("matrix_view", "conv"), (4, 3, 3, 3), "matrices"),
        (AdaDiag(refresh_every=2), change("matrix_view", "conv"), (4, 8, 6), "experts"),
        (AdaDiag(), change("preconditioner", "Soap"), (24, 12), "matrices"),
        (Eigenbasis(), lambda o: setattr(o.param_groups[0]["params"][0], "data", torch.ones(24, 12).double()), (24, 12),
         "matrices"),
    ],
    ids=range(6),
)  # fmt: skip
def test_another_basis_in_training_is_refused(preconditioner, changed, shape, view) -> None:
    p, direction = made(shape)
    other, gradient = made((4, 4))
    optimizer = SelectiveUpdate(torch.optim.SGD([p, other], lr=1e-3), preconditioner=preconditioner, matrix_view=view)
    for _ in range(3):
        p.grad, other.grad = direction, gradient
        optimizer.step()
    changed(optimizer)
    p.grad = direction.to(p.dtype)
    with pytest.raises(ValueError, match="a basis would be another"):
        optimizer.step()


def test_before_the_first_step_anything_may_change_and_nonsense_never() -> None:
    p, direction = made()
    optimizer = SelectiveUpdate(torch.optim.AdamW([p]), preconditioner=AdaDiag())
    (group,) = optimizer.preconditioner_groups
    group.preconditioner = "Soap"
    for name, value in (("matrix_view", "nonsense"), ("preconditioner", "Nonsense")):
        with pytest.raises(ValueError, match="onsense"):
            setattr(group, name, value)
    with pytest.raises(TypeError):
        optimizer.preconditioner_groups[0] = None  # type: ignore[index]
    p.grad = direction
    optimizer.step()
    assert "by Soap()" in optimizer.explain()


def test_flags_of_products_are_left_as_found_by_threads() -> None:
    flag = torch.backends.cuda.matmul
    before = flag.fp32_precision
    flag.fp32_precision = "tf32"
    try:
        jobs = []
        for seed in range(3):
            p, direction = made(seed=seed)
            optimizer = SelectiveUpdate(torch.optim.AdamW([p]), preconditioner=Soap(refresh_every=1))

            def work(p=p, optimizer=optimizer, direction=direction) -> None:
                for step in range(30):
                    p.grad = noisy(direction, step)
                    optimizer.step()

            jobs.append(threading.Thread(target=work))
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        assert flag.fp32_precision == "tf32"
    finally:
        flag.fp32_precision = before


def test_a_first_gradient_of_zeros_costs_a_step_and_not_a_round() -> None:
    """LoRA's A, whose B begins at zero."""
    p, direction = made()
    optimizer = SelectiveUpdate(torch.optim.AdamW([p]), policy=MGUP(), preconditioner=AdaDiag())
    refreshes = []
    for step in range(6):
        p.grad = noisy(direction, step) if step else torch.zeros_like(p)
        optimizer.step()
        (said,) = optimizer.statistics().values()
        refreshes.append(int(said["refreshes"]))
    assert refreshes == [0, 1, 1, 1, 1, 1]


def test_numbers_beside_a_groups_preconditioner_are_refused() -> None:
    p, _ = made()
    base = torch.optim.AdamW([{"params": [p], "preconditioner": "Soap", "refresh_every": 5}])
    with pytest.raises(ValueError, match=r"'refresh_every' beside its preconditioner.*go into it"):
        SelectiveUpdate(base)


class TurnsTooFar(FixedRotation):
    """Returns maps of a shape that does not fit."""

    def is_due(self, steps, place, count):
        return True

    def refresh(self, states, grads):
        from selective.preconditioner import Carry

        return [Carry(left=torch.eye(3)[None]) for _ in states]


def test_maps_that_do_not_fit_are_refused_before_anything_moves() -> None:
    p, direction = made()
    optimizer = SelectiveUpdate(torch.optim.AdamW([p]), preconditioner=TurnsTooFar())
    before = p.detach().clone()
    p.grad = direction
    with pytest.raises(RuntimeError, match=r"its Carry has left as torch.float32 \[1, 3, 3\], must be .*\[1, 16, 16\]"):
        optimizer.step()
    assert torch.equal(p, before)


def test_norms_and_gains_are_vectors_whatever_their_shape() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.rms = nn.LayerNorm([16, 8]), nn.RMSNorm([4, 16, 8])
            self.gamma, self.cls_token = nn.Parameter(torch.ones(1, 8, 1, 1)), nn.Parameter(torch.ones(1, 1, 8))
            self.heads = nn.ModuleList([nn.Linear(8, 8, bias=False)])
            self.inside = nn.Linear(8, 16, bias=False)
            self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(8, 3, bias=False))

    found = {group["name"]: {name for name, _ in group["params"]} for group in param_groups_for(Net())}
    assert found["vectors"] == {"norm.weight", "norm.bias", "rms.weight", "gamma", "cls_token"}
    assert found["head"] == {"classifier.1.weight"}
    assert found["matrices"] == {"heads.0.weight", "inside.weight"}
    with pytest.raises(ValueError, match="write a list"):
        param_groups_for(Net(), head="classifier")


class Writing(Eigenbasis):
    """Somebody's own: its refresh writes what ours only reads, and then may raise."""

    raises: bool = False

    def refresh(self, states: Any, grads: Any) -> Any:
        found = super().refresh(states, grads)
        for state in states:
            state["columns_gram"].zero_()
        if self.raises:
            raise RuntimeError("on purpose")
        return found


@pytest.mark.parametrize("raises", [False, True])
def test_what_a_subclass_writes_is_put_back_too(raises: bool) -> None:
    """After a gradient with NaN in the step of a refresh, and after an error."""
    p, direction = made()
    space = Writing(sides="columns", refresh_every=3, stagger=False, raises=raises)
    optimizer = SelectiveUpdate(torch.optim.AdamW([p], lr=1e-3), preconditioner=space)
    found = []
    for step in range(4):
        p.grad = noisy(direction, step)
        if step == 1:  # the first average is there, so that the first refresh comes
            p.grad = torch.full_like(p, torch.nan)
        before = optimizer.state[p]["selective/basis/columns_gram"].clone() if step else torch.zeros(12, 12)
        if raises and step == 1:
            with pytest.raises(RuntimeError, match="on purpose"):
                optimizer.step()
            found.append((before, optimizer.state[p]["selective/basis/columns_gram"].clone()))
            break
        optimizer.step()
        found.append((before, optimizer.state[p]["selective/basis/columns_gram"].clone()))
    before, after = found[1]
    assert before.any()
    if raises:
        assert torch.equal(after, before)
    else:  # 0.95 of it, a step in which nothing was added; had the zeros stayed, it would be nothing
        assert after.norm() > 0.9 * before.norm()
