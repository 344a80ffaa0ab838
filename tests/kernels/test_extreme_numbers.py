"""Numbers that overflow a sum, and a default device that is not the tensors' own."""

from __future__ import annotations

import pytest
import torch

from selective.kernels import Draw, Item, Selection, SGDRule, Strength, selective_step
from selective.kernels.cpu import chunks
from selective.kernels.cpu import rules as moments

BACKENDS = ["cpu", "reference"]
BAD = [1e30, float("nan"), float("inf")]  # 1e30 is finite, its square in float32 is not


def stepped(strength: Strength, backend: str, bad: float, numel: int = 40) -> tuple[torch.Tensor, Item]:
    """One step of SGD from zeros on gradients of 1, one of which is `bad`; the parameter and its item."""
    grad = torch.ones(numel)
    grad[3] = bad
    item = Item(torch.zeros(numel), grad, {}, 0, {"average": torch.ones(())})
    selective_step(
        [item], rule=SGDRule(0.5, 0.9), selection=Selection("agreement"), strength=strength, draw=Draw(0, 0),
        backend=backend,
    )  # fmt: skip
    return item.param, item


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("of", ["update", "momentum", "gradient"])
def test_a_norm_that_is_not_finite_leaves_the_other_coordinates_alone(backend: str, bad: float, of: str) -> None:
    param, _ = stepped(Strength("norm_preserving", of=of, cap=2.0), backend, bad)
    others = torch.cat([param[:3], param[4:]])
    assert torch.equal(others, torch.full((39,), -0.5))  # × 1, as the base would


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", BAD)
def test_an_average_survives_a_gradient_that_is_not_finite(backend: str, bad: float) -> None:
    _, item = stepped(Strength("alignment"), backend, bad)
    # the cosine counts as 0, sigmoid(0) = 1/2: 0.9 + 0.1 / 2, to one rounding of float32
    assert float(item.policy_state["average"]) == pytest.approx(0.95, rel=torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("selection", [Selection("agreement"), Selection("top_k"), Selection("bernoulli")])
@pytest.mark.parametrize("strength", [Strength("fixed", 2.0, 0.5), Strength("mean_preserving"), Strength("alignment")])
def test_the_default_device_is_not_asked(selection, strength, monkeypatch) -> None:
    """torch.set_default_device("cuda") is common; tensors that stay on the CPU are stepped there nevertheless."""
    monkeypatch.setattr(chunks, "_buffers", chunks._Buffers())
    moments._trusted.cache_clear()
    results = []
    for device in ("meta", "cpu"):
        grad = torch.linspace(-1, 1, 70_000)  # more than a top-K's sample
        item = Item(torch.zeros_like(grad), grad, {}, 0, {"average": torch.ones(())})
        with torch.device(device):
            selective_step([item], rule=SGDRule(0.5, 0.9), selection=selection, strength=strength, draw=Draw(0, 0),
                           statistics=True)  # fmt: skip
        results.append(item.param)
    assert torch.equal(*results)
    assert results[0].any()
