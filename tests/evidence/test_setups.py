"""The setups of scripts/evidence: each is built and steps, and the prototypes do what they say."""

from __future__ import annotations

import pytest
import torch
from evidence.forecast import completed
from evidence.plan import STAGES, wanted
from evidence.prototypes.masked_muon import MaskedMuon
from evidence.prototypes.momentum_basis import MomentumBasis
from evidence.prototypes.stepper import Finishes, by_kind
from evidence.prototypes.tail_average import TailAverage
from evidence.prototypes.whitened_muon import WhitenedMuon
from evidence.runs import Results, Run
from evidence.setups import SETUPS, control_of, has_control, optimizer_of, setup_of
from evidence.sweeps import first_rest
from evidence.tasks import TASKS
from torch import Tensor, nn

STEPS = 5  # one after the second refresh of a basis that is refreshed every 3
CONTROLS = [control_of(name) for name in SETUPS if has_control(name) and "Magma" not in name]  # Magma is random itself


class Toy(nn.Module):
    """An embedding, two matrices, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.up, self.down = nn.Linear(4, 8, bias=False), nn.Linear(8, 4, bias=False)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 6, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        return self.head(self.norm(hidden + self.down(torch.relu(self.up(hidden)))))


def toy() -> Toy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Toy()


def trained(model: nn.Module, optimizer: object, steps: int) -> list[float]:
    tokens = torch.arange(6)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(tokens), tokens.roll(1))
        optimizer.zero_grad()  # pyright: ignore[reportAttributeAccessIssue]
        loss.backward()
        optimizer.step()  # pyright: ignore[reportAttributeAccessIssue]
        losses.append(loss.item())
    return losses


def test_every_setup_is_built_and_steps() -> None:
    ends = {}
    for name in [*SETUPS, *CONTROLS]:
        model = toy()
        steps = 21 if "averaged" in name else STEPS  # a shorter average is the last value
        optimizer = optimizer_of(Run("toy", name, 1e-2, rest_lr=first_rest(name)), model, steps)
        trained(model, optimizer, steps)
        if isinstance(optimizer, Finishes):
            optimizer.finish()
        ends[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert ends[name].isfinite().all(), name
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}, name
    assert not torch.equal(ends["AdamW"], torch.cat([p.flatten() for p in toy().parameters()]))
    names = list(ends)
    same = [(a, b) for i, a in enumerate(names) for b in names[:i] if torch.equal(ends[a], ends[b])]
    assert same == [], "two setups that are the same one"


def test_every_stage_begins_with_runs_of_setups_that_there_are() -> None:
    at_home = completed(Results([]))  # stages 4 and 5 begin at the rates that were best there
    for stage in STAGES:
        runs = wanted(Results([]), [stage])
        assert bool(runs) == (stage not in (4, 5))
        runs = wanted(at_home, [stage])
        assert runs, stage
        assert {run.task for run in runs} <= TASKS.keys()
        assert all(setup_of(run.setup) for run in runs)


def test_norm_controlled_setups_keep_the_norms_of_inner_matrices() -> None:
    model = toy()
    before = {kind: [p.detach().clone() for p in mine] for kind, mine in by_kind(model).items()}
    optimizer = optimizer_of(Run("toy", "AdamW, norm controlled", 0.01, rest_lr=0.003), model, 1)
    trained(model, optimizer, 1)
    for kind, mine in by_kind(model).items():
        for p, old in zip(mine, before[kind], strict=True):
            kept = p.norm().item() == pytest.approx(old.norm().item(), rel=1e-5)  # float32
            assert kept == (kind == "matrices") or kind == "vectors", kind
            # the chord of a turn whose tangent is 0.01, less what the radial part of the update takes
            assert kind != "matrices" or 0.2 * 0.01 < ((p - old).norm() / old.norm()).item() <= 0.01 * 1.01


def test_a_tail_average_is_that_of_the_weights() -> None:
    model, steps = toy(), 40
    optimizer = TailAverage(torch.optim.SGD(model.parameters(), lr=0.1), model, steps)
    weight, embedding = model.up.weight, model.embedding.weight
    seen = []
    for _ in range(steps):
        trained(model, optimizer, 1)
        seen.append(weight.detach().double().clone())
    average = seen[30]  # τ is 2 steps, and the average begins 10 steps before the end
    for value in seen[31:]:
        average = average + (value - average) / 2
    untouched = embedding.detach().clone()
    optimizer.finish()
    torch.testing.assert_close(weight.detach().double(), (seen[-1] + average) / 2, rtol=1e-5, atol=1e-7)
    assert torch.equal(embedding, untouched)


def test_a_basis_of_the_momentum_has_its_singular_vectors() -> None:
    """In the first step moments are those of one gradient, so that Adam's update is ±1 in the basis."""
    gradient = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.svd(gradient, full_matrices=False)[0]
    update = basis @ torch.sign(basis.T @ gradient)
    for transposed in (False, True):
        p = nn.Parameter(torch.zeros_like(gradient.T if transposed else gradient))
        p.grad = gradient.T.contiguous() if transposed else gradient
        MomentumBasis([p], lr=1.0, weight_decay=0.0).step()
        torch.testing.assert_close(p.detach(), -update.T if transposed else -update, rtol=1e-5, atol=1e-5)  # eps: 1e-8


def test_whitened_muon_is_muon_where_all_directions_are_alike() -> None:
    """Of an orthogonal gradient, both take the same orthogonal step, up to Newton-Schulz in bfloat16."""
    gradient = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0]
    ends = []
    for kind in (WhitenedMuon, torch.optim.Muon):
        p = nn.Parameter(torch.zeros(6, 6))
        p.grad = gradient.clone()
        kind([p], lr=1.0).step()
        ends.append(p.detach())
    assert torch.linalg.svdvals(ends[0]).min() > 0.6
    assert torch.linalg.svdvals(ends[1]).min() > 0.6


def test_a_mask_around_the_orthogonalisation() -> None:
    """Momentum of an opposite gradient: coordinates, or rows, that disagree with the present gradient are left out."""
    first = torch.eye(4) + 0.1
    second = first.clone()
    second[0] *= -0.5  # the first row turns round, too little for its momentum to turn as well
    for where in ("before", "rows"):
        p = nn.Parameter(torch.zeros(4, 4))
        optimizer = MaskedMuon([p], lr=1.0, weight_decay=0.0, momentum=0.95, where=where)
        p.grad = 100 * first
        optimizer.step()
        before = p.detach().clone()
        p.grad = second
        optimizer.step()
        moved = p.detach() - before
        assert torch.equal(moved[0], torch.zeros(4)), where
        assert (moved[1:].norm(dim=1) > 0.5).all(), where
