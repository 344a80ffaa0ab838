"""timm: every optimizer of its registry as a base, its groups with layer decay, its scheduler, and a resume.

An optimizer that needs a package or a device which is not here can't be made; timm's own error says which.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from base_optimizers import MIXED, give_grads
from stack_loops import CASES, assert_same, differences
from their_timm import import_timm
from torch import Tensor, nn

from selective import MGUP, Eigenbasis, Policy, SelectiveUpdate

timm = import_timm()

# Without opt_einsum its contractions of three and more dimensions take minutes: timm warns when it is made.
NEEDS_EINSUM = ("kron", "kronc", "kronw")
REFUSED = {
    "adahessian": r"Adahessian can't be wrapped: .*second derivatives.*create_graph=True.*AdamW",
    "madgrad": r"MADGRAD can't be wrapped: .*iterates in its state \('x0'\)",
    "madgradw": r"MADGRAD can't be wrapped: .*iterates in its state \('x0'\)",
}
MISSING = ("bnb", "fused")  # bitsandbytes and Apex, which timm takes on CUDA devices only
NAMES = [
    name
    for name in timm.optim.list_optimizers()
    if not name.startswith(MISSING) and name not in REFUSED and name not in NEEDS_EINSUM
]


class OnesForTimm(Policy):
    def mask(self, view: Any) -> Tensor:
        return torch.ones_like(view.update)


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """Kron compiles its step."""
    with torch.compiler.set_stance("force_eager"):
        yield


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in MIXED]


def make(name: str, params: Any) -> torch.optim.Optimizer:
    return timm.optim.create_optimizer_v2(params, opt=name, lr=1e-2, weight_decay=0.1)


def stepped(name: str, steps: int = 4, **options: Any) -> list[nn.Parameter]:
    params = parameters()
    optimizer: Any = make(name, params)
    if options:
        optimizer = SelectiveUpdate(optimizer, **options)
    for step in range(steps):
        give_grads(params, step)
        with torch.random.fork_rng():  # Kron probes with random vectors
            torch.manual_seed(step)
            optimizer.step()
    return params


def furthest(some: list[nn.Parameter], others: list[nn.Parameter]) -> float:
    return max(float((p - q).detach().abs().max()) for p, q in zip(some, others, strict=True))


def test_there_are_many() -> None:
    assert len(NAMES) > 60


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_of_ones_is_the_base_and_another_is_not(name: str) -> None:
    """Rounding: parameters near 1, rounded once more in each of four steps, which Adan and Adafactor pass on through
    what they divide by (measured: at most 2e-6 in six steps, 16 eps). The mask moves more than a hundred times that.
    """
    bare = stepped(name)
    assert furthest(stepped(name, policy=OnesForTimm()), bare) <= 32 * torch.finfo(torch.float32).eps
    assert furthest(stepped(name, policy=MGUP()), bare) > 1e-4


@pytest.mark.parametrize("name", NEEDS_EINSUM[:2])
def test_kron(name: str) -> None:
    pytest.importorskip("opt_einsum")
    bare = stepped(name)
    assert furthest(stepped(name, policy=OnesForTimm()), bare) <= 32 * torch.finfo(torch.float32).eps
    assert furthest(stepped(name, policy=MGUP()), bare) > 1e-4


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[name]):
        SelectiveUpdate(make(name, parameters()), policy=MGUP())


@pytest.mark.parametrize("name", ["adamw", "nadamw", "adopt", "lion", "laprop", "sgdw"])
def test_a_rotation_takes_and_resumes(name: str) -> None:
    def build() -> tuple[nn.Module, SelectiveUpdate]:
        model = nn.ParameterList(parameters())
        return model, SelectiveUpdate(
            make(name, list(model)), policy=MGUP(), preconditioner=Eigenbasis(refresh_every=2)
        )

    def train(run: tuple[nn.Module, SelectiveUpdate], first: int, last: int) -> None:
        for step in range(first, last):
            give_grads(list(run[0].parameters()), step)  # type: ignore[arg-type]
            run[1].step()

    run = build()
    train(run, 0, 3)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in run], file)
    train(run, 3, 6)
    resumed = build()
    file.seek(0)
    for part, saved in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(saved)
    train(resumed, 3, 6)
    for p, q in zip(resumed[0].parameters(), run[0].parameters(), strict=True):
        assert torch.equal(p, q)
    bare = stepped(name, 6)
    assert furthest(list(run[0].parameters()), bare) > 1e-4  # type: ignore[arg-type]


def vision(case: str) -> tuple[Any, SelectiveUpdate, Any]:
    """A tiny transformer with layer decay, and the cosine schedule with warm-up, as timm's own script makes them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, num_heads=2, depth=2, num_classes=3
        )
    base = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.7)
    optimizer = SelectiveUpdate(base, **CASES[case])
    schedule = timm.scheduler.CosineLRScheduler(optimizer, t_initial=8, warmup_t=2, warmup_lr_init=1e-4)
    return model, optimizer, schedule


def train_vision(model: Any, optimizer: SelectiveUpdate, schedule: Any, first: int, last: int) -> None:
    for step in range(first, last):
        pictures = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(pictures), torch.tensor([0, 2])).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step(step + 1)


@pytest.mark.parametrize("case", ["mgup", "random-soap"])
def test_a_model_with_layer_decay_and_schedule_resumes_bit_for_bit(case: str) -> None:
    whole = vision(case)
    train_vision(*whole, 0, 2)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in whole[:2]], file)
    train_vision(*whole, 2, 4)
    resumed = vision(case)
    file.seek(0)
    for part, saved in zip(resumed[:2], torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(saved)
    train_vision(*resumed, 2, 4)
    assert_same(resumed[:2], whole[:2])
    assert len({group["lr"] for group in whole[1].param_groups}) > 2  # the schedule keeps the scale of each layer
    cold = vision(case)
    train_vision(*cold, 2, 4)
    assert differences(cold[:2], whole[:2])
