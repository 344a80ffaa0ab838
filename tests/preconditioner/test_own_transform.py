"""A transform of somebody's own, as docs/reference/preconditioners.md shows one: a Hadamard rotation of the rows."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from base_optimizers import BASES, build, give_grads

from selective import MGUP, Dense, Preconditioner, SelectiveUpdate, preconditioner_from
from selective.step_count import check_recordable


class HadamardOfTests(Preconditioner):
    """Mixes the rows of matrices that have a power of two of them; needs no state and no refresh."""

    largest: int = 64

    def takes(self, shape):
        rows = shape[1]
        return 2 <= rows <= self.largest and rows & (rows - 1) == 0

    def project_in(self, states, xs):
        h = torch.ones(1, 1, device=xs[0].device)
        while h.shape[0] < xs[0].shape[1]:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        return list((h / math.sqrt(h.shape[0])) @ torch.stack(list(xs)))

    project_out = project_in  # symmetric, and its own inverse


def parameters(*shapes: tuple[int, ...]) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]


@pytest.mark.parametrize("name", ["sgd-momentum", "sgd-nesterov"])
def test_sgd_does_not_see_it(name: str) -> None:
    ours, theirs = parameters((16, 5), (6, 5), (3,)), parameters((16, 5), (6, 5), (3,))
    rotated = SelectiveUpdate(build(BASES[name], ours), preconditioner=HadamardOfTests())
    plain = build(BASES[name], theirs)
    for step in range(10):
        give_grads(ours, step)
        give_grads(theirs, step)
        rotated.step()
        plain.step()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=2e-6)
    assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[2], theirs[2])  # not a power of two; no matrix


@pytest.mark.parametrize("name", ["adamw-foreach", "nadam", "adafactor", "po-lion"])
@pytest.mark.parametrize("policy", [Dense(), MGUP()], ids=["dense", "mgup"])
def test_other_bases_do_and_go_on_after_a_checkpoint(name: str, policy: Any) -> None:
    def made() -> Any:
        params = parameters((16, 5), (6, 5))
        return params, SelectiveUpdate(build(BASES[name], params), policy=policy, preconditioner=HadamardOfTests())

    params, optimizer = made()
    plain = parameters((16, 5), (6, 5))
    without = SelectiveUpdate(build(BASES[name], plain), policy=policy)
    for step in range(4):
        give_grads(params, step)
        give_grads(plain, step)
        optimizer.step()
        without.step()
    assert torch.equal(params[1], plain[1])
    assert (params[0] - plain[0]).abs().max() > 1e-3
    others, resumed = made()
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(4, 7):
        give_grads(params, step)
        give_grads(others, step)
        optimizer.step()
        resumed.step()
    assert torch.equal(params[0], others[0])


def test_it_goes_to_data_and_back() -> None:
    made = preconditioner_from({"kind": "HadamardOfTests", "largest": 8})
    assert made == HadamardOfTests(largest=8)
    assert preconditioner_from(made.model_dump_json()) == made
    assert preconditioner_from(None) is None
    base = torch.optim.AdamW(parameters((16, 5)))
    explained = SelectiveUpdate(base, preconditioner=made).explain()
    assert "param_groups[0][0]: HadamardOfTests does not take [1, 16, 5]" in explained
    assert "none of them, by HadamardOfTests(largest=8)" in explained


def test_a_step_with_one_is_not_recorded_into_a_cuda_graph() -> None:
    base = torch.optim.AdamW(parameters((16, 5)), capturable=True)
    check_recordable(base, base.param_groups, "ignore", rotates=False)
    with pytest.raises(RuntimeError, match=r"CUDA graph capture .* with a preconditioner, .* preconditioner=None"):
        check_recordable(base, base.param_groups, "ignore", rotates=True)
    with pytest.raises(RuntimeError, match=r"CUDA graph capture .* with sharded parameters, .* scope='local'"):
        check_recordable(base, base.param_groups, "ignore", rotates=False, asks=True)
