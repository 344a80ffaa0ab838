"""8-bit bases and 16-bit parameters: resumed bit for bit with policy and preconditioner, and the bytes they keep."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from stack_loops import CASES, LR
from torch import Tensor, nn
from torch.optim import Optimizer

from selective import MGUP, AlphaConsistency, SelectiveUpdate

WIDE, DEEP = 128, 64  # 8,192 elements: 8-bit optimizers keep tensors of less than 4,096 exact
NUMBER = WIDE * DEEP


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """torchao compiles its step; what is tested is not the compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


def _torchao(params: Any) -> Optimizer:
    return pytest.importorskip("torchao.optim").AdamW8bit(params, lr=LR)


def _bitsandbytes(params: Any) -> Optimizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it uses torch.jit.script
        return pytest.importorskip("bitsandbytes").optim.AdamW8bit(params, lr=LR)


BASES: dict[str, Callable[[Any], Optimizer]] = {"torchao": _torchao, "bitsandbytes": _bitsandbytes}


class Run:
    """One matrix and one vector, with gradients by step."""

    def __init__(self, base: Callable[[Any], Optimizer], dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.model = nn.Module()
        generator = torch.Generator().manual_seed(0)
        self.model.matrix = nn.Parameter(torch.randn(WIDE, DEEP, generator=generator).to(dtype))
        self.model.vector = nn.Parameter(torch.randn(WIDE, generator=generator).to(dtype))
        self.optimizer = SelectiveUpdate(base(list(self.model.parameters())), **options)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(100 + step)
            for p in self.model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            self.optimizer.step()

    def resumed(self, file: Any, *made: Any, **options: Any) -> Run:
        """Another one, made the same way, from what this one saves now."""
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
        other = Run(*made, **options)
        saved = torch.load(file, weights_only=True)
        other.model.load_state_dict(saved["model"])
        other.optimizer.load_state_dict(saved["optimizer"])
        return other

    def differs(self, other: Run) -> list[str]:
        pairs = zip(self.model.named_parameters(), other.model.parameters(), strict=True)
        return [name for (name, p), q in pairs if not torch.equal(p, q)]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("case", CASES)
def test_eight_bit_states_resume_bit_for_bit(case: str, base: str, tmp_path: Any) -> None:
    made = BASES[base]
    run = Run(made, **CASES[case])
    run.train(0, 3)
    again = run.resumed(tmp_path / "at-3.pt", made, **CASES[case])
    for one in (run, again):
        one.train(3, 6)
    assert again.differs(run) == []
    exact = Run(lambda params: torch.optim.AdamW(params, lr=LR), **CASES[case])
    exact.train(0, 6)
    assert "matrix" in exact.differs(run)  # its moments are rounded to 8 bits


def test_a_policy_that_needs_a_momentum_reads_torchaos_and_says_that_bitsandbytes_has_none() -> None:
    Run(_torchao, policy=AlphaConsistency()).train(0, 2)
    with pytest.raises(ValueError, match="keeps no first moment of the gradient; pass momentum_beta"):
        Run(_bitsandbytes, policy=AlphaConsistency())
    Run(_bitsandbytes, policy=AlphaConsistency(), momentum_beta=0.9).train(0, 2)


def _adamw(params: Any) -> Optimizer:
    return torch.optim.AdamW(params, lr=1e-3)


@pytest.mark.parametrize("case", [case for case in CASES if case != "dense"])
def test_stochastic_rounding_resumes_bit_for_bit(case: str, tmp_path: Any) -> None:
    options = {**CASES[case], "stochastic_rounding": True}
    made = (_adamw, torch.bfloat16)
    run = Run(*made, **options)
    run.train(0, 3)
    again = run.resumed(tmp_path / "at-3.pt", *made, **options)
    for one in (run, again):
        one.train(3, 6)
    assert again.differs(run) == []
    nearest = Run(*made, **CASES[case])
    nearest.train(0, 6)
    assert "matrix" in nearest.differs(run)


def kept(run: Run) -> int:
    """Bytes of all state of the matrix: the base's and ours."""
    return sum(_bytes(value) for value in run.optimizer.state[run.model.matrix].values())


def _bytes(value: Any) -> int:
    if not isinstance(value, Tensor):
        return 0
    if hasattr(value, "__tensor_flatten__"):
        return sum(_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])  # type: ignore[operator]
    return value.nbytes


# What docs/guides/stacks.md says, in bytes for each element of the matrix. Beside it a policy is 528 bytes a tensor
# (step, seed, JSON), a preconditioner's counts and JSON about as much, 8-bit tables of 256 float32 1 KiB a moment.
SMALL = 4_096
SIDES = 4 * (WIDE**2 + DEEP**2) / NUMBER  # one float32 square matrix a side
BYTES: dict[str, tuple[Callable[[Any], Optimizer], torch.dtype, dict[str, Any], float]] = {
    "AdamW": (_adamw, torch.float32, {}, 8),
    "AdamW, policy": (_adamw, torch.float32, {"policy": MGUP()}, 8),
    "AdamW, bfloat16": (_adamw, torch.bfloat16, {"policy": MGUP()}, 4),
    "AdamW, bfloat16, stochastic": (_adamw, torch.bfloat16, {"policy": MGUP(), "stochastic_rounding": True}, 4),
    "AdamW, momentum of ours": (_adamw, torch.bfloat16, {"policy": MGUP(), "momentum_beta": 0.9}, 4 + 4),
    "torchao": (_torchao, torch.float32, {"policy": MGUP()}, 2 * (1 + 4 / 256)),
    "bitsandbytes": (_bitsandbytes, torch.float32, {"policy": MGUP()}, 2 * (1 + 4 / 256)),
    "AdamW, Soap": (_adamw, torch.float32, {**CASES["soap"]}, 8 + 2 * SIDES),
    "torchao, Soap": (_torchao, torch.float32, {**CASES["random-soap"]}, 2 * (1 + 4 / 256) + 2 * SIDES),
}


@pytest.mark.parametrize("path", BYTES)
def test_bytes_are_those_of_the_page(path: str) -> None:
    base, dtype, options, each = BYTES[path]
    run = Run(base, dtype, **options)
    run.train(0, 3)
    found = kept(run)
    assert math.floor(each * NUMBER) <= found <= each * NUMBER + SMALL, found / NUMBER
