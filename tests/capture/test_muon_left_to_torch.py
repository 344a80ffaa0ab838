"""Some of Muon's parameters are left to the base's own step, and `explain()` has the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from muon_problems import (
    MuonOnes,
    bare,
    give_grads,
    make_params,
    momenta,
    reason_of,
    same,
    way_of,
    wrapped,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import Muon

from selective import MGUP, Dense, SelectiveUpdate, Soap
from selective.base import muon as muon_numbers


class Subclass(Muon):
    """A class that might have another step."""


def not_plain(p: torch.Tensor) -> torch.nn.Parameter:
    class Marked(torch.nn.Parameter):
        pass

    return Marked(p.detach())


LEFT: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "a subclass": (lambda: Subclass(make_params()), {}, "no fused rule for Subclass"),
    "own momentum": (lambda: bare(make_params()), {"momentum_beta": 0.9}, "momentum_beta is given"),
    "bfloat16 without nesterov": (
        lambda: bare(make_params(torch.bfloat16), nesterov=False), {}, "torch normalises the momentum itself"
    ),
    "a tensor for momentum": (
        lambda: bare(make_params(), momentum=torch.tensor(0.9)), {}, "does not cover a momentum that is a tensor"
    ),
    "a subclass of Parameter": (
        lambda: bare([not_plain(p) for p in make_params()]), {}, "does not cover a parameter that is a Marked"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_covered_is_the_bases_own_step(name: str) -> None:
    make, options, reason = LEFT[name]
    optimizer = SelectiveUpdate(make(), policy=MGUP(), **options)
    assert way_of(optimizer) == "scratch"
    assert reason in reason_of(optimizer)
    with pytest.raises(ValueError, match="capture='fused' is not possible for"):
        SelectiveUpdate(make(), policy=MGUP(), capture="fused", **options)


@pytest.mark.parametrize("nesterov", [True, False])
def test_torch_normalises_its_own_momentum_in_bfloat16_without_nesterov(nesterov: bool) -> None:
    """The reason for which such groups are left to it. If a newer torch does not do it, ours can take them."""
    p = make_params(torch.bfloat16)[0]
    give_grads([p], 0)
    assert p.grad is not None
    torchs = bare([p], nesterov=nesterov)
    torchs.step()
    usual = float((0.05 * p.grad).norm())
    norm = float(momenta(torchs)[0].norm())
    assert abs(norm - (usual if nesterov else 1.0)) < 0.01
    assert abs(usual - 1.0) > 0.1


@pytest.mark.filterwarnings("ignore:.*rotates or orthogonalises:UserWarning")
@pytest.mark.parametrize("policy", [None, "MGUP"])
def test_under_a_preconditioner_the_base_steps(policy: Any) -> None:
    params = make_params()
    optimizer = SelectiveUpdate(bare(params), policy=policy, preconditioner=Soap(refresh_every=2))
    for step in range(3):
        give_grads(params, step)
        optimizer.step()
    assert way_of(optimizer) == ("scratch" if policy else "dense")
    rotation = optimizer.groups.plans[0].rotation
    assert rotation is not None
    assert rotation.capture.way == "scratch"
    assert "takes no rotated gradients" in rotation.capture.reason


def test_sharded_matrices_are_stepped_by_the_base() -> None:
    """Also if a matrix is replaced by a sharded one in mid-run."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain = make_params()[:2]
        optimizer = wrapped(plain, MGUP())
        assert way_of(optimizer) == "fused"
        sharded = [torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in plain]
        optimizer.param_groups[0]["params"] = sharded
        for p in sharded:
            p.grad = distribute_tensor(torch.ones(p.shape), mesh, [Shard(0)])
        optimizer.step()
        assert way_of(optimizer) == "scratch"
        assert "DTensors: Newton-Schulz needs whole matrices" in reason_of(optimizer)
        optimizer = wrapped(sharded, Dense(), wrap={"capture": "fused"})
        assert way_of(optimizer) == "dense"
    finally:
        dist.destroy_process_group()


def test_options_of_a_newer_torch_are_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon_numbers, "_OPTIONS", muon_numbers._OPTIONS | {"maximize", "foreach"})
    params = make_params()
    optimizer = wrapped(params)
    optimizer.base.param_groups[0]["foreach"] = True  # the way, and not the result
    assert optimizer.explain() and way_of(optimizer) == "fused"
    optimizer.base.param_groups[0]["maximize"] = True
    give_grads(params, 0)
    optimizer.step()
    assert way_of(optimizer) == "scratch"
    assert "maximize=True" in reason_of(optimizer)


def test_a_step_that_was_replaced_is_run() -> None:
    params, calls = make_params(), []
    base = bare(params)
    own = base.step
    base.step = lambda closure=None: calls.append(1) or own(closure)
    optimizer = SelectiveUpdate(base, policy=MuonOnes())
    give_grads(params, 0)
    optimizer.step()
    assert way_of(optimizer) == "scratch"
    assert calls


@pytest.mark.parametrize("option,value", [("ns_steps", 100), ("ns_coefficients", (1.0, 2.0))])
def test_numbers_that_torch_refuses_are_refused_before_anything_moves(option: str, value: Any) -> None:
    params = make_params()
    optimizer = wrapped(params)
    optimizer.param_groups[0][option] = value
    before = [p.detach().clone() for p in params]
    give_grads(params, 0)
    with pytest.raises(ValueError, match=option):
        optimizer.step()
    same(params, before)
    assert not optimizer.base.state
