"""Products in bfloat16 stay in it up to the parameter, with the numbers that float32 copies of them would give."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from rotated_twins import bucket_by_bucket
from transforms import FixedRotation, Narrow, Rounding

from selective import MGUP, AlphaConsistency, CautiousMGUP, Eigenbasis, SelectiveUpdate
from selective.preconditioner import Preconditioner

SHAPES = [(12, 20), (20, 12), (12, 20)]
BASES: dict[str, Any] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, nesterov=True),
}


def trained(preconditioner: Preconditioner, base: str, policy: Any, **options: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in SHAPES]
    optimizer = SelectiveUpdate(BASES[base](params), policy=policy, preconditioner=preconditioner, **options)
    for _ in range(6):
        for p in params:
            p.grad = torch.randn(*p.shape, generator=generator)
        optimizer.step()
    return [p.detach() for p in params] + [v for p in params for v in optimizer.base.state[p].values()]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("policy", [CautiousMGUP(), MGUP(), AlphaConsistency()], ids=lambda policy: policy.kind)
def test_the_same_bits_as_of_float32_copies(policy: Any, base: str) -> None:
    """Parameters and the base's state, whose dtypes are the parameter's: also SGD's, made in the first step."""
    Narrow.seen.clear()
    narrow, wide = trained(Narrow(), base, policy), trained(Rounding(), base, policy)
    assert torch.bfloat16 in set(Narrow.seen)
    for a, b in zip(narrow, wide, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    exact = trained(FixedRotation(), base, policy)
    assert not torch.equal(narrow[0], exact[0])  # the twin: rounding makes a difference


@pytest.mark.parametrize("capture", ["scratch", "delta"])
def test_other_captures_and_a_mask_of_the_original_space_are_given_float32(capture: str) -> None:
    for options in ({"capture": capture}, {"mask_space": "original"}):
        Narrow.seen.clear()
        narrow, wide = (trained(space(), "adamw", CautiousMGUP(), **options) for space in (Narrow, Rounding))
        assert set(Narrow.seen) == {torch.float32}
        assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


def test_stochastic_rounding_is_the_parameters_alone() -> None:
    """An update that is rotated back is rounded to nearest, so that float32 parameters do not depend on the draw."""
    given = [trained(Narrow(), "adamw", CautiousMGUP(), stochastic_rounding=on)[0] for on in (False, True)]
    assert torch.equal(*given)


def test_an_eigenbasis_in_bfloat16_is_near_the_one_in_float32() -> None:
    """Rotated gradients are off by 2^-9 of ‖g‖ twice, Adam's step of each element by at most its own size."""
    low, exact = (
        trained(Eigenbasis(precision=precision, stagger=False, refresh_every=100), "adamw", CautiousMGUP())
        for precision in ("bfloat16", "float32")
    )
    start = trained(Eigenbasis(start_step=100), "sgd", CautiousMGUP())  # another rule altogether
    for a, b, c in zip(low[:3], exact[:3], start[:3], strict=True):
        assert 0 < (a - b).norm() < 0.2 * (c - b).norm()


class Asked(FixedRotation):
    """Due in steps 0 and 3; writes down what it is asked."""

    reads: bool = True
    log: ClassVar[list[tuple[str, int, bool]]] = []

    def is_due(self, steps, place, count):
        return steps % 3 == 0

    def refreshes_from_gradients(self):
        return self.reads

    def refresh(self, states, grads):
        self.log.append(("refresh", len(states), all(bool((g == 0).all()) for g in grads)))
        return [None] * len(states)

    def denoise(self, states, rotated):
        self.log.append(("denoise", len(states), False))
        return list(rotated)


@pytest.mark.parametrize("reads", [True, False])
def test_only_new_bases_are_asked_to_denoise_and_only_readers_get_gradients(reads: bool) -> None:
    Asked.log.clear()
    trained(Asked(reads=reads), "adamw", CautiousMGUP())
    refreshes = [("refresh", 2, not reads), ("refresh", 1, not reads)]
    denoised = [("denoise", 2, False), ("denoise", 1, False)]
    assert Asked.log == 2 * [*refreshes, *denoised]  # in the first and in the fourth of six steps


@pytest.mark.parametrize(("precision", "calls"), [("float32", 3), ("bfloat16", 2)])
def test_twice_as_many_elements_fit_in_half_the_bytes(
    precision: Any, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five matrices, of which two fit at a time in float32, four in bfloat16; a mask of the original space is wide."""
    counts: list[int] = []
    really = Eigenbasis.project_in

    def watched(self: Eigenbasis, states: Any, xs: Any) -> list[torch.Tensor]:
        counts.append(len(xs))
        return really(self, states, xs)

    bucket_by_bucket(monkeypatch)
    monkeypatch.setattr(Eigenbasis, "project_in", watched)
    monkeypatch.setattr("selective.rotation.rotation.ROTATED", 2 * 6 * 4)
    for space, wanted in (("rotated", calls), ("original", 3)):
        params = [torch.nn.Parameter(torch.randn(6, 4)) for _ in range(5)]
        rotation = Eigenbasis(precision=precision)
        base = torch.optim.AdamW(params)
        optimizer = SelectiveUpdate(base, policy=MGUP(), preconditioner=rotation, mask_space=space)
        for _ in range(2):
            counts.clear()
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        assert (len(counts), sum(counts)) == (wanted, 5)
