"""Muon's rule in the steps of a user: missing gradients, rates, layouts, errors, decay, settings of the process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from muon_problems import (
    DECAY,
    RATE,
    SHAPES,
    MuonOnesInPython,
    give_grads,
    make_params,
    momenta,
    same,
    way_of,
    wrapped,
)

from selective import MGUP, CautiousDecay, CautiousMGUP
from selective.kernels import use_backend


def test_missing_gradients_added_parameters_and_rates() -> None:
    """Against a run in which each matrix has an optimizer of its own."""
    together, alone = make_params(torch.float64), make_params(torch.float64)
    optimizer = wrapped(together[:5], lr=torch.tensor(RATE))
    singles = [wrapped([p], lr=torch.tensor(RATE)) for p in alone]
    for step in range(6):
        if step == 3:
            optimizer.add_param_group({"params": together[5:], "lr": -RATE})
            for single in singles[5:]:
                single.param_groups[0]["lr"] = -RATE
        optimizer.param_groups[0]["lr"].fill_(RATE / (step + 1))
        for single in singles[:5]:
            single.param_groups[0]["lr"].fill_(RATE / (step + 1))
        give_grads(together, step)
        give_grads(alone, step)
        for params in (together, alone):
            params[4].grad = torch.zeros_like(params[4])
            params[step % 5].grad = None
        optimizer.step()
        for index, single in enumerate(singles):
            if index < 5 or step >= 3:
                single.step()
    # the products of a stack may be summed in another order: 2^-4 of a rate is what Newton-Schulz may be off by
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=6 * RATE * 3.0 * 2.0**-4)
    same([m.float() for m in momenta(optimizer)], [m.float() for s in singles for m in momenta(s)])


def test_zeros_stay_and_odd_layouts_step() -> None:
    generator = torch.Generator().manual_seed(0)
    zero = torch.nn.Parameter(torch.ones(4, 6))
    turned = torch.nn.Parameter(torch.randn(6, 4, generator=generator).t())
    cut = torch.nn.Parameter(torch.randn(4, 12, generator=generator)[:, ::2])
    empty = torch.nn.Parameter(torch.empty(0, 5))
    flat = [torch.nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in (turned, cut)]
    optimizer, plain = wrapped([zero, turned, cut, empty]), wrapped(flat)
    for step in range(3):
        give_grads([zero, turned, cut, empty], step)
        zero.grad = torch.zeros_like(zero)
        for p, q in zip((turned, cut), flat, strict=True):
            assert p.grad is not None
            q.grad = p.grad.contiguous()
        optimizer.step()
        plain.step()
    torch.testing.assert_close(zero.detach(), torch.full((4, 6), (1 - RATE * DECAY) ** 3), rtol=3 * 2.0**-23, atol=0)
    for p, q in zip((turned, cut), flat, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=3 * RATE * 2.0**-4)
    assert turned.stride() == (1, 4)


def test_what_the_policy_raises_leaves_the_weights() -> None:
    class MuonRaises(MuonOnesInPython):
        def mask(self, view):
            if view.name.endswith("[4]"):
                raise RuntimeError("not this one")
            return super().mask(view)

    params = make_params()
    optimizer = wrapped(params, MuonRaises())
    before = [p.detach().clone() for p in params]
    give_grads(params, 0)
    with pytest.raises(RuntimeError, match="not this one"):
        optimizer.step()
    same(params, before)


@pytest.mark.parametrize("of", ["update", "masked"])
def test_selective_decay_and_statistics(of: Any) -> None:
    """Decay where the update has the sign of the parameter; here the update is known from a run without decay."""
    params, without = make_params(torch.float64), make_params(torch.float64)
    optimizer = wrapped(params, MGUP(), wrap={"decay": CautiousDecay(of=of)})
    other = wrapped(without, MGUP(), weight_decay=0.0)
    for some, one in ((params, optimizer), (without, other)):
        give_grads(some, 0)
        one.step()
    assert way_of(optimizer) == "fused"
    for start, p, q in zip(make_params(torch.float64), params, without, strict=True):
        moved = start - q
        decays = (moved * start > 0).double()
        torch.testing.assert_close(p.detach(), start * (1 - RATE * DECAY * decays) - moved, rtol=0, atol=1e-15)
    for index, p in enumerate(params):
        share = optimizer.statistics()[f"param_groups[0][{index}]"]["share"]
        assert abs(float(share) - int(0.5 * p.numel()) / p.numel()) < 1e-7  # a float32 number


def test_in_triton() -> None:
    """Interpreted where there is no GPU: updates that lie in one stack, masked by the kernels."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs = []
    for backend in ("gpu", "reference"):
        params = [torch.nn.Parameter(p.detach().to(device)) for p in make_params(shapes=SHAPES[:3])]
        optimizer = wrapped(params, CautiousMGUP())
        for step in range(2):
            for index, p in enumerate(params):
                generator = torch.Generator().manual_seed(10 * step + index)
                p.grad = torch.randn(p.shape, generator=generator).to(device)
            with use_backend(backend):
                optimizer.step()
        runs.append((params, momenta(optimizer)))
    for p, q in zip(runs[0][0], runs[1][0], strict=True):
        # the factor, the difference and the mask are rounded otherwise, twice, of weights below 4
        torch.testing.assert_close(p, q, rtol=0, atol=2 * 3 * 4 * 2.0**-24)
    same(runs[0][1], runs[1][1])


@pytest.mark.parametrize("setting", [torch.inference_mode, lambda: torch.autocast("cpu", torch.float16)])
def test_settings_of_the_process_change_nothing(setting: Any) -> None:
    inside, outside = make_params(), make_params()
    one, other = wrapped(inside, "MGUP"), wrapped(outside, "MGUP")
    for step in range(2):
        give_grads(inside, step)
        give_grads(outside, step)
        with setting():
            one.step()
        other.step()
    same(inside, outside)
