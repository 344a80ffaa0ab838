"""The papers' rules through the whole wrapper: AdamW under Soap() and AdaDiag() against float64 transcriptions."""

from __future__ import annotations

import pytest
import torch
from transcribed_rotations import AdaDiagRule, SoapRule

from selective import AdaDiag, Eigenbasis, SelectiveUpdate, Soap

F64, EPS = torch.float64, torch.finfo(torch.float32).eps
ROWS, COLUMNS, STEPS = 12, 18, 50
BASIS = "selective/basis/{}_basis"


def gradients() -> list[torch.Tensor]:
    """Correlated in rows and columns, of full rank, with separate eigenvalues."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    left = torch.linalg.qr(normal(ROWS, ROWS)).Q * torch.logspace(0, -1, ROWS, dtype=F64)
    right = torch.linalg.qr(normal(COLUMNS, COLUMNS)).Q * torch.logspace(0, -1, COLUMNS, dtype=F64)
    return [(left @ normal(ROWS, COLUMNS) @ right.mT).float().to(F64) for _ in range(STEPS)]


def wrapped(preconditioner, betas: tuple[float, float]) -> tuple[torch.nn.Parameter, SelectiveUpdate]:
    start = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(4))
    p = torch.nn.Parameter(start)
    base = torch.optim.AdamW([p], lr=1e-2, betas=betas, weight_decay=0.0)
    return p, SelectiveUpdate(base, preconditioner=preconditioner)


def basis_of(optimizer: SelectiveUpdate, p: torch.nn.Parameter, side: str) -> torch.Tensor | None:
    value = optimizer.state[p].get(BASIS.format(side))
    return None if value is None else value[0].to(F64)


def off(p: torch.nn.Parameter, wanted: torch.Tensor) -> float:
    """Largest distance, in eps of the largest weight."""
    return float((p.detach().to(F64) - wanted).abs().max() / wanted.abs().max()) / EPS


@pytest.mark.parametrize("solver", ["qr", "cholesky"])
@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("carry", ["rotate", "squared"])
def test_soap_around_adamw_is_soap(every: int, solver, carry) -> None:
    """On the bases that the wrapper has. Each of 50 steps rounds the weights once, by half an eps of themselves.

    carry="rotate" is SOAP's own. With the default second moments follow by the squared maps; all else is SOAP's.
    """
    p, optimizer = wrapped(Soap(refresh_every=every, solver=solver, carry=carry), (0.95, 0.95))
    rule = SoapRule(p.detach().to(F64), 1e-2, every, squared=carry == "squared")
    start = p.detach().clone()
    for step, grad in enumerate(gradients()):
        p.grad = grad.float()
        optimizer.step()
        if step == 0:
            assert torch.equal(p, start)  # only the statistics move
        else:
            left, right = basis_of(optimizer, p, "rows"), basis_of(optimizer, p, "columns")
            assert left is not None and right is not None
            rule.bases = [left, right]
        rule.step(grad)
        assert off(p, rule.weights) < 25, step
    assert float((rule.weights - start.to(F64)).abs().max()) > 0.1


@pytest.mark.parametrize("sides", ["one", "two"])
def test_adadiag_that_keeps_its_moments_is_the_papers(sides) -> None:
    p, optimizer = wrapped(AdaDiag(sides=sides, carry="keep", refresh_every=7, floor=0.0), (0.9, 0.999))
    rule = AdaDiagRule(p.detach().to(F64), 1e-2)
    for step, grad in enumerate(gradients()):
        p.grad = grad.float()
        optimizer.step()
        left, right = basis_of(optimizer, p, "rows"), basis_of(optimizer, p, "columns")
        assert left is not None
        if step % 7 == 0:  # right after a refresh what is off the diagonal is rounding, and nobody's to agree on
            rule.weights = p.detach().to(F64)
            m, v = (optimizer.base.state[p][key].to(F64) for key in ("exp_avg", "exp_avg_sq"))
            rule.m, rule.v, rule.time = m, v, step + 1
            assert AdaDiagRule.is_of(grad, left, right) < 1e-5
        else:
            rule.step(grad, left, right)
            assert off(p, rule.weights) < 25, step
    moments = optimizer.base.state[p]
    torch.testing.assert_close(moments["exp_avg"].to(F64), rule.m, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("preconditioner", "numbers"),
    [
        (AdaDiag(), ROWS**2 + 1),
        (AdaDiag(sides="two"), ROWS**2 + COLUMNS**2 + 1),
        (Eigenbasis(sides="one"), 2 * ROWS**2),
        (Eigenbasis(), 2 * (ROWS**2 + COLUMNS**2)),
        (Soap(max_dim=ROWS), 2 * ROWS**2),
    ],
    ids=repr,
)
def test_memory_is_as_documented(preconditioner, numbers: int) -> None:
    """Float32 numbers of a matrix, beside the base's own state and a few counters; `explain()` says as many."""
    p, optimizer = wrapped(preconditioner, (0.9, 0.99))
    p.grad = gradients()[0].float()
    optimizer.step()
    entries = {key: value for key, value in optimizer.state[p].items() if key.startswith("selective/")}
    kept = {key: value for key, value in entries.items() if value.is_floating_point()}
    assert sum(value.nbytes for value in kept.values()) == 4 * numbers
    assert all(value.dtype == torch.float32 for value in kept.values())
    lasting = sum(value.nbytes for key, value in entries.items() if key.startswith("selective/basis/"))
    assert f"{lasting:,} bytes that last" in optimizer.explain()
    assert lasting <= 4 * numbers + 100


class HoldsMemory(torch.optim.Optimizer):
    """Steps the memory that its parameters had at first."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 0.1})
        self.flat: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for p in self.param_groups[0]["params"]:
            self.flat.setdefault(id(p), p.data).sub_(0.1 * p.grad.sign())


def test_a_base_that_holds_on_to_memory_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(4, 6))
    with pytest.raises(ValueError, match=r"memory that it got hold of earlier.*or preconditioner=None"):
        SelectiveUpdate(HoldsMemory([p]), preconditioner=AdaDiag())
    SelectiveUpdate(HoldsMemory([p]), policy="MGUP")  # where nothing is rotated it is stepped in place
