"""A program that compiles every launch of some steps for a GPU that need not exist, instead of launching it.

Triton's compiler refuses code that the interpreter accepts (a name that changes its type in a loop). The steps are
taken on CPU tensors. No launch happens, and our steps do not read what one would have written. It prints a line for
each kernel, and before them a line for each group of three arguments: WHAT KINDS RULES.
"""

from __future__ import annotations

import re
import sys
import time
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from sharded_pieces import shards
from step_cases import KINDS, RULES
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError

from selective.kernels import Control, Decay, Draw, Item, Matrices, Selection, Strength
from selective.kernels.gpu import launch, plan, products
from selective.kernels.gpu import matrices as norms
from selective.kernels.gpu.sharded import step as by_kernels
from selective.kernels.gpu.sharded import sums as shard_sums
from selective.kernels.sharded.selective_step import sharded_step
from selective.kernels.spec import StepSpec

TARGET = GPUTarget("cuda", 90, 32)  # a Hopper
NORMS = {  # of the update, whose moments are stored while it is summed up
    "norm": (Selection("agreement"), Strength("norm_preserving")),
    "top_k_norm": (Selection("top_k", fraction=0.4), Strength("norm_preserving")),
}
STILL = Selection("agreement"), Strength("fixed", 1.0, -1.0, still=True)
TYPES = {
    torch.int32: "*i32", torch.int64: "*i64", torch.float32: "*fp32", torch.float64: "*fp64", torch.int8: "*i8",
    torch.bfloat16: "*bf16", torch.float16: "*fp16",
}  # fmt: skip
SHARDED = {
    "top_k": (Selection("top_k", fraction=0.4), Strength("fixed", 2.0, 0.5)),
    "mean": (Selection("agreement"), Strength("mean_preserving")),
    "norm": (Selection("top_k", fraction=0.4), Strength("norm_preserving")),
    "previous": (Selection("agreement", product="previous_momentum"), Strength("norm_preserving", of="momentum")),
}


class Compiler:
    """Takes the place of `launch.run`."""

    def __init__(self) -> None:
        self.done: set[Any] = set()
        self.code: list[str] = []  # of each kernel, before the parts that depend on the device

    def __call__(
        self,
        kernel: Any,
        programs: int,
        *arguments: Any,
        warps: int = 4,
        registers: int | None = None,
        **constants: Any,
    ) -> None:
        if programs == 0:
            return
        constants.pop("launch_cooperative_grid", None)
        stages = constants.pop("num_stages", None)
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        fixed = {p.name for p in kernel.params if p.is_constexpr}
        signature = {name: "constexpr" if name in fixed else _type_of(given[name]) for name in kernel.arg_names}
        values = {(place,): given[name] for place, name in enumerate(kernel.arg_names) if name in fixed}
        key = (kernel.fn, warps, tuple(signature.items()), tuple((k, repr(v)) for k, v in values.items()))
        if key in self.done:
            return
        self.done.add(key)
        began = time.perf_counter()
        made = triton.compile(
            ASTSource(kernel, signature, values), target=TARGET,
            options={"num_warps": warps, "enable_fp_fusion": False, "maxnreg": registers}
            | ({} if stages is None else {"num_stages": stages}),
        )  # fmt: skip
        self.code.append(made.asm["ttgir"])
        took = time.perf_counter() - began
        print(f"{kernel.fn.__name__}: {len(made.asm['cubin'])} bytes, {took:.1f} s", flush=True)


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _parted(rule: str) -> tuple[str, str, str]:
    return rule.partition("/")


def whole_tensors(kinds: list[str], rules: list[str]) -> None:
    """A kind is "top_k"; with selective decay "top_k+update"; its matched random control "control:top_k".

    "unscaled:top_k" is a control that does not keep the norm. A rule is "adamw"; of bfloat16 tensors "adamw/bfloat16".
    """
    for rule, dtype in ((RULES[name], getattr(torch, of or "float32")) for name, _, of in map(_parted, rules)):
        for name, _, of in (kind.partition("+") for kind in kinds):
            controlled, _, kind = name.rpartition(":")
            selection, strength = {"still": STILL, **NORMS, **KINDS}[kind]
            if controlled:
                selection = replace(selection, control=Control(norm=controlled == "control"))
            decay: Any = Decay(of=of) if of else None  # type: ignore[arg-type]
            for statistics in (False, True):
                p = torch.randn(300_000, dtype=dtype)  # drawn from, bracketed and settled
                state = {"step": torch.tensor(3.0), "exp_avg": p.clone(), "exp_avg_sq": p.square()}
                if getattr(rule, "amsgrad", False):
                    state["max_exp_avg_sq"] = p.square()
                item = Item(p, torch.randn(300_000, dtype=dtype), state, 0)
                plan.selective_step([item], StepSpec(rule, selection, strength, Draw(1, 2), statistics, decay))


def parts_of_tensors(kinds: list[str], rules: list[str]) -> None:
    for rule in (RULES[name] for name in rules):
        for selection, strength in (SHARDED[name] for name in kinds):
            for statistics in (False, True):
                (items,) = shards(rule, 1, "plain", torch.float32)
                (one,) = sharded_step(
                    items, StepSpec(rule, selection, strength, Draw(1, 2), statistics), local_step=plan.selective_step,
                    kernels=lambda item: by_kernels.ShardKernels,
                )  # fmt: skip
                one.resume()
                while one.pending_addends is not None:
                    one.resume(one.pending_addends.clone())


def matrices(sizes: list[str], sides: list[str]) -> None:
    """A size is "512x1376"; a side is "rows", "columns", or "neither" for a product by itself.

    The sums of three products are added up outside of the tensor cores, which round towards zero. A single product of
    TF32 would be added up inside.
    """
    for size in sizes:
        rows, columns = map(int, size.split("x"))
        x, numbers = torch.zeros(1, rows, columns), {"factors": torch.ones(1), "left_out": torch.ones(1).bool()}
        for side in sides:
            if side == "neither":
                products.float32_product(x, x.mT)
                products.float32_product(x, x.mT, symmetric=True)
                products.float32_product(x, x.mT, symmetric=True, upper_a=True)
                products.float32_product(x, x.mT, lower_b=True)
                continue
            n = rows if side == "rows" else columns
            average = torch.zeros(1, n, n)
            both = (average, None) if side == "rows" else (None, average)
            products.average_grams_(*both, x, **numbers, weight=0.5)
    compiler: Any = products.run
    assert all(map(_sums_outside, compiler.code))
    products.PRECISION = "tf32"
    products.float32_product(torch.zeros(1, 20, 20), torch.zeros(1, 20, 20))
    assert not _sums_outside(compiler.code[-1])


def kept_norms(dtypes: list[str], starts: list[str]) -> None:
    """A start is "zero" or "difference", with a rate that is a number, or a tensor."""
    for dtype in (getattr(torch, name) for name in dtypes):
        for start in starts:
            for size in ((48, 32), (5, 7)):  # on addresses that are multiples of 16 bytes, and on others
                options: Any = {"matrices": Matrices(1, *size), "from_zero": start == "zero"}
                params, rate = [torch.ones(size, dtype=dtype)], torch.ones(()) if start == "zero" else 0.1
                old = norms.hold_matrices_(params, zero=start == "zero")
                totals = norms.norm_sums(params, old, **options)
                norms.turn_matrices_(params, old, totals, **options, rate=rate)


def _sums_outside(code: str) -> bool:
    """True if sums of a tensor core's results are formed by additions of its own."""
    return re.search(r"arith\.addf .*tensor<\d+x\d+xf32, #mma>", code) is not None


@triton.jit
def changes_its_type(x_ptr, n):
    at = tl.load(x_ptr)
    if n > 0:
        at = n
    tl.store(x_ptr, at)


def what_is_refused(kinds: list[str], rules: list[str]) -> None:
    try:
        launch.run(changes_its_type, 1, torch.zeros(1, dtype=torch.int64), 5)
    except CompilationError as error:
        print(type(error).__name__, flush=True)


def main(what: str, kinds: str, rules: str) -> None:
    print("group:", what, kinds, rules, flush=True)
    compiler: Any = Compiler()
    launch.run = by_kernels.run = shard_sums.run = products.run = norms.run = compiler
    steps = {
        "whole": whole_tensors,
        "parts": parts_of_tensors,
        "matrices": matrices,
        "norms": kept_norms,
        "refused": what_is_refused,
    }
    steps[what](kinds.split(","), rules.split(","))
    assert compiler.done, "nothing was launched"


if __name__ == "__main__":
    for at in range(1, len(sys.argv), 3):
        main(*sys.argv[at : at + 3])
