"""Kernels go through Triton's compiler and NVIDIA's assembler, for a Hopper, where there is no GPU.

Both are in Triton's wheel. In a process of its own, since kernels of this one may be the interpreter's. See
`tests/support/compiled_kernels.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[1] / "support" / "compiled_kernels.py"


def compiled(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, timeout=250, env=environment
    )


def compiled_in(done: subprocess.CompletedProcess[str], *group: str) -> set[str]:
    """The kernels of one group of arguments, and the errors."""
    _, _, lines = done.stdout.partition(f"group: {' '.join(group)}\n")
    return {line.partition(":")[0] for line in lines.partition("group:")[0].splitlines()}


def test_launches_compile_and_what_the_compiler_refuses_is_noticed(tmp_path: Path) -> None:
    """One process for what is often changed: exact top-K, products of matrices; and the failing twin."""
    top_k, product, refused = ("whole", "top_k", "adamw"), ("matrices", "40x64", "rows"), ("refused", "-", "-")
    norms = "norms", "float32", "zero"
    done = compiled(tmp_path, *top_k, *product, *norms, *refused)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"selective_step_kernel", "settle_kernel", "repair_kernel"} <= compiled_in(done, *top_k)
    assert "product_kernel" in compiled_in(done, *product)
    assert {"hold_kernel", "norm_sums_kernel", "turn_kernel"} <= compiled_in(done, *norms)
    assert compiled_in(done, *refused) == {"CompilationError"}


@pytest.mark.parametrize(
    "what, kinds, rules, wanted",
    [
        pytest.param("whole", "agreement", "adamw", {"selective_step_kernel"}, marks=pytest.mark.slow),
        pytest.param("whole", "top_k_mean", "adamw,lion", {"settle_kernel", "repair_kernel"}, marks=pytest.mark.slow),
        pytest.param(
            "whole", "top_k_norm", "adamw", {"ranked_strengths_kernel", "ties_kernel"}, marks=pytest.mark.slow
        ),
        pytest.param("whole", "norm", "adamw", {"strengths_kernel", "sums_kernel"}, marks=pytest.mark.slow),
        pytest.param(
            "whole",
            "previous,sampled,element",
            "adamw",
            {"seen_kernel", "digits_kernel", "strengths_kernel"},
            marks=pytest.mark.slow,
        ),
        pytest.param("whole", "element+masked", "adamw", {"selective_step_kernel"}, marks=pytest.mark.slow),
        pytest.param("whole", "control:still", "adamw", {"control_kernel", "limit_kernel"}, marks=pytest.mark.slow),
        pytest.param(
            "whole",
            "control:top_k_mean,control:sampled,control:element,unscaled:still,control:previous+update",
            "adamw",
            {"control_kernel", "limit_kernel"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "whole",
            "control:top_k,control:still",
            "adam_coupled,adam_amsgrad_maximize,sgd_nesterov,lion",
            {"control_kernel", "limit_kernel"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "whole",
            "agreement+update,top_k+update,top_k+masked,top_k_mean+gradient",
            "adamw,lion",
            {"selective_step_kernel", "settle_kernel", "repair_kernel"},
            marks=pytest.mark.slow,
        ),
        pytest.param("whole", "top_k", "lion", {"count_kernel", "finish_kernel"}, marks=pytest.mark.slow),
        pytest.param(
            "whole",
            "top_k,top_k_norm",
            "adamw/bfloat16,sgd_nesterov/float16",
            {"count_kernel", "narrow_kernel", "finish_kernel", "settle_kernel", "sums_kernel"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "whole",
            "agreement,top_k",
            "adam_coupled,sgd_nesterov",
            {"count_kernel", "finish_kernel"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "parts",
            "top_k,mean",
            "adamw",
            {"keys_kernel", "cutoff_kernel", "shard_sums_kernel"},
            marks=pytest.mark.slow,
        ),
        pytest.param("parts", "norm,previous", "adamw", {"shard_sums_kernel"}, marks=pytest.mark.slow),
        pytest.param(
            "parts",
            "top_k",
            "adam_amsgrad_maximize,sgd_nesterov,lion",
            {"keys_kernel", "digits_kernel", "numbers_of_kernel"},
            marks=pytest.mark.slow,
        ),
        pytest.param("norms", "float32,bfloat16,float16", "zero,difference", {"turn_kernel"}, marks=pytest.mark.slow),
        pytest.param("matrices", "300x40", "rows,columns,neither", {"product_kernel"}, marks=pytest.mark.slow),
    ],
)
def test_every_launch_compiles(tmp_path: Path, what: str, kinds: str, rules: str, wanted: set[str]) -> None:
    found = compiled(tmp_path, what, kinds, rules)
    assert found.returncode == 0, found.stdout + found.stderr
    assert wanted <= {line.partition(":")[0] for line in found.stdout.splitlines()}
