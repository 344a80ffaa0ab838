"""Rotated parameters through the Triton kernels: interpreted on a machine without a GPU, compiled on one with."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations as combinations_of
from itertools import product
from typing import Any

import pytest
import torch
from base_optimizers import BASES, build, give_grads
from transforms import Narrow, Turning

from selective import MGUP, Cautious, CautiousMGUP, Dense, Eigenbasis, SelectiveUpdate
from selective.kernels import use_backend
from selective.rotation.buffers import Buffer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(name: str, backend: Any, dtype: torch.dtype, **options: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((12, 8), (8,), (12, 8), (6, 5))
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(DEVICE, dtype)) for s in shapes]
    with use_backend(backend):
        optimizer = SelectiveUpdate(build(BASES[name], params), **options)
        for step in range(3):
            cpu = [torch.nn.Parameter(p.detach().cpu()) for p in params]
            give_grads(cpu, step)
            for p, c in zip(params, cpu, strict=True):
                p.grad = c.grad.to(DEVICE)  # type: ignore[union-attr]
            optimizer.step()
    return [p.detach().float().cpu() for p in params]


SPACES = {"turning": Turning(every=2), "narrow": Narrow()}
NAMES = ["adamw-foreach", "sgd-momentum", "adafactor"]
POLICIES = [Dense(), CautiousMGUP(), Cautious(), MGUP()]
DTYPES = [torch.float32, torch.bfloat16]


def combinations() -> Iterator[Any]:
    """All of them; three in four are slow, and what is not has every pair of two properties."""
    for s, n, p, d in product(*map(range, (len(SPACES), len(NAMES), len(POLICIES), len(DTYPES)))):
        space, name, policy, dtype = list(SPACES)[s], NAMES[n], POLICIES[p], DTYPES[d]
        marks = [] if (s, d) == ((n + p) % 2, (n + p // 2) % 2) else [pytest.mark.slow]
        yield pytest.param(SPACES[space], name, policy, dtype, marks=marks, id=f"{space}-{name}-{policy}-{dtype}")


def test_every_pair_of_properties_is_tried() -> None:
    often = [cell.values for cell in combinations() if not cell.marks]
    for a, b in combinations_of(range(4), 2):
        pairs = {(repr(cell[a]), repr(cell[b])) for cell in often}
        assert len(pairs) == len({pair[0] for pair in pairs}) * len({pair[1] for pair in pairs})
    assert len(often) == 12


@pytest.mark.parametrize("space, name, policy, dtype", list(combinations()))
def test_the_kernels_step_rotated_parameters_as_the_reference_does(
    space: Any, name: str, policy: Any, dtype: torch.dtype
) -> None:
    options = {"policy": policy, "preconditioner": space}
    found, expected = run(name, "gpu", dtype, **options), run(name, "reference", dtype, **options)
    for a, b in zip(found, expected, strict=True):
        tolerance = (64 if dtype == torch.float32 else 3 * 2**16) * torch.finfo(torch.float32).eps * 4
        far = (a - b).abs() > tolerance  # but for coordinates on the edge of a selection
        assert far.float().mean() <= 0.03


@pytest.mark.parametrize("policy", [Cautious(), pytest.param(MGUP(), marks=pytest.mark.slow)], ids=repr)
def test_the_kernels_step_in_stacks_as_the_reference_does(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffers of a step are elsewhere in each step, and the tables of the kernels follow them."""
    places: set[int] = set()
    real = Buffer.take

    def elsewhere(self: Buffer) -> None:
        real(self)
        kept.append(torch.empty(self.flat.numel()))  # so that the next one can't have the same place
        places.add(self.flat.data_ptr())

    kept: list[torch.Tensor] = []
    options = {"policy": policy, "preconditioner": Eigenbasis(stagger=False, start_step=2)}
    expected = run("adamw-foreach", "reference", torch.float32, **options)
    monkeypatch.setattr(Buffer, "take", elsewhere)
    found = run("adamw-foreach", "gpu", torch.float32, **options)
    assert len(places) > 3
    for a, b in zip(found, expected, strict=True):
        far = (a - b).abs() > 64 * torch.finfo(torch.float32).eps * 4  # but for coordinates on the edge of a selection
        assert far.float().mean() <= 0.03
