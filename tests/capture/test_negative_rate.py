"""A negative learning rate climbs as `maximize` does: the same coordinates are selected, and the same bits come out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_optimizer
import torch

from selective import (
    MGUP,
    AdaDiag,
    Cautious,
    Eigenbasis,
    Magma,
    SelectiveUpdate,
    Soap,
    StepView,
)
from selective.kernels import use_backend
from selective.policies import Policy

t = torch.optim
Make = Callable[..., torch.optim.Optimizer]
BASES: dict[str, Make] = {
    "adamw": lambda p, **o: t.AdamW(p, lr=1e-2, weight_decay=0.0, **o),
    "sgd": lambda p, **o: t.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, **o),
    "lion": lambda p, **o: pytorch_optimizer.Lion(p, lr=1e-2, weight_decay=0.0, **o),
    "nadam": lambda p, **o: t.NAdam(p, lr=1e-2, **o),
}
WAYS: dict[str, dict[str, Any]] = {
    "auto": {},
    "scratch": {"capture": "scratch"},
    "delta": {"capture": "delta"},
    "own momentum": {"momentum_beta": 0.9},
    "eigenbasis": {"preconditioner": Eigenbasis(refresh_every=2)},
    "soap, delta": {"preconditioner": Soap(refresh_every=2), "capture": "delta"},
    "adadiag, original": {"preconditioner": AdaDiag(refresh_every=2), "mask_space": "original"},
}


class Reads(Policy):
    """Code of its own, by signs that differ where only one of gradient, update and momentum is turned round."""

    reads = frozenset({"grad", "update", "momentum", "previous_momentum"})

    def mask(self, view: StepView) -> torch.Tensor:
        return (view.grad + view.momentum + 0.5 * view.previous_momentum > 0) | (view.update * view.grad > 0)


POLICIES: dict[str, Policy] = {
    "cautious": Cautious(),
    "mgup": MGUP(),
    "magma": Magma(),
    "own code": Reads(),
}


def make(base: str, policy: str, way: str, device: str = "cpu", **options: Any) -> SelectiveUpdate:
    params = [
        torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device))
        for seed, shape in enumerate([(6, 4), (7,)])
    ]
    return SelectiveUpdate(BASES[base](params, **options), policy=POLICIES[policy], **WAYS[way])


def step(optimizer: SelectiveUpdate, number: int) -> list[torch.Tensor]:
    params = optimizer.param_groups[0]["params"]
    for seed, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * number + seed)).to(p.device)
    optimizer.step()
    return params


def both(base: str, policy: str, way: str, rate: Any = -1e-2, device: str = "cpu") -> None:
    """Steps with a negative rate and with `maximize`: the same weights, and the same statistics of each step."""
    negative, climbing = make(base, policy, way, device), make(base, policy, way, device, maximize=True)
    negative.param_groups[0]["lr"] = rate
    for number in range(4):
        for p, q in zip(step(negative, number), step(climbing, number), strict=True):
            # delta capture subtracts from weights below 4 in float32; elsewhere it is the same arithmetic but for signs
            tolerance = 0.0 if way == "auto" else 8 * torch.finfo(torch.float32).eps
            assert (p - q).abs().max() <= tolerance
        one, other = negative.statistics(), climbing.statistics()
        assert one.keys() == other.keys()
        for name, values in one.items():
            if "share" not in values:  # Soap's first step only makes its basis
                continue
            assert torch.equal(values["share"], other[name]["share"])
            assert (values["cosine"] - other[name]["cosine"]).abs() < 1e-5  # float32 sums of 24 products


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("base", BASES)
def test_selects_as_maximize_does(base: str, way: str, policy: str) -> None:
    both(base, policy, way)


@pytest.mark.parametrize(
    ("base", "policy"),
    [("adamw", "mgup"), ("sgd", "magma"), ("lion", "cautious"), ("nadam", "mgup"), ("adamw", "cautious")],
)
def test_in_triton(base: str, policy: str) -> None:
    """Interpreted where there is no GPU. The rate is a tensor, as the kernels read one on the device."""
    with use_backend("gpu"):
        rate = torch.tensor(-1e-2, dtype=torch.float64) if base in ("adamw", "sgd") else -1e-2
        both(base, policy, "auto", rate, "cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("way", ["auto", "scratch", "eigenbasis"])
@pytest.mark.parametrize("base", ["adamw", "nadam"])
def test_a_rate_that_is_a_tensor(base: str, way: str) -> None:
    both(base, "mgup", way, torch.tensor(-1e-2, dtype=torch.float64))


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["auto", "scratch", "delta", "eigenbasis"])
@pytest.mark.parametrize("policy", ["mgup", "own code"])
def test_a_rate_on_the_device(policy: str, way: str) -> None:
    both("adamw", policy, way, torch.tensor(-1e-2, dtype=torch.float64, device="cuda"), "cuda")


@pytest.mark.parametrize("way", ["auto", "scratch", "delta"])
def test_a_schedule_that_goes_below_zero(way: str) -> None:
    """A step of rate 0 in between. From the first step below it on, what climbs with the update is selected."""
    optimizer = make("adamw", "cautious", way)
    for number, rate in enumerate((1e-2, 1e-2, 0.0, -1e-2, -1e-2)):
        optimizer.param_groups[0]["lr"] = rate
        params = optimizer.param_groups[0]["params"]
        before = [p.detach().clone() for p in params]
        step(optimizer, number)
        for p, old in zip(params, before, strict=True):
            assert p.grad is not None
            along = (p.detach() - old) * p.grad * (1 if rate < 0 else -1)
            assert along.min() >= 0  # never against the gradient while it descends, never with it while it climbs
            assert (along > 0).any() == (rate != 0)


@pytest.mark.parametrize("policy", ["cautious", "own code"])
def test_unturned_it_would_select_the_others(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault as it was: the gradient of descent beside the update of an ascent."""
    monkeypatch.setattr("selective.kernels.cpu.rules.rate_of", lambda rule: 1.0)
    monkeypatch.setattr("selective.capture.fused.as_seen", lambda rule, moved: moved)
    with pytest.raises(AssertionError):
        both("adamw", policy, "auto")
