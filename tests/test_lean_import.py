"""`import selective` and a first step on a CPU load nothing beyond torch that takes long without being needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from optional import missing

# The declared dependencies, with what pydantic itself requires.
LIGHT = {"selective", "pydantic", "pydantic_core", "annotated_types", "typing_inspection", "typing_extensions"}
HEAVY = ("triton", "torch._dynamo", "torch._inductor", "torch.distributed", "torch.fx", "sympy", "numpy")
IMPORT = "import selective, selective.kernels"
PREPARE = """
import torch
class Own(torch.optim.NAdam): pass  # unknown: it is tried out
def made(cls):
    params = [torch.nn.Parameter(torch.ones(8, 4)), torch.nn.Parameter(torch.ones(4))]
    for p in params:
        p.grad = torch.ones_like(p)
    base = cls(params, lr=1e-3)
    base.step()  # what the base itself loads
    return base
bases = [made(c) for c in (torch.optim.AdamW, torch.optim.NAdam, torch.optim.Adafactor, Own)]
import selective
"""
STEPS = """
captures = set()
for base in bases:
    for policy, preconditioner in (("MGUP", None), ("Cautious", None), ("RandomMask", "AdaDiag"), ("Dense", None)):
        opt = selective.SelectiveUpdate(base, policy=policy, preconditioner=preconditioner)
        opt.step()
        opt.statistics(), opt.explain()
        captures |= {(plan.capture.way, plan.capture.facts.source) for plan in opt.groups.plans}
assert {("fused", "table"), ("delta", "table"), ("scratch", "measured"), ("dense", "table")} <= captures, captures
"""


def loaded(code: str, before: str, folder: Path) -> set[str]:
    """The modules that `code` loads in a fresh process, beyond what `before` has loaded."""
    script = f"{before}\nimport sys\nseen = set(sys.modules)\n{code}\nprint('loaded', *sorted(set(sys.modules) - seen))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0, run.stderr
    name, *found = run.stdout.splitlines()[-1].split()
    assert name == "loaded"
    return set(found)


def heavy(modules: set[str]) -> list[str]:
    """Those that are on the list, and those that are neither light nor of the standard library."""
    found = []
    for module in sorted(modules):
        top = module.partition(".")[0]
        known = top in LIGHT | {"torch"} | set(sys.stdlib_module_names) or top.startswith("_sysconfigdata")
        if not known or any(module == name or module.startswith(f"{name}.") for name in HEAVY):
            found.append(module)
    return found


def test_the_import_is_light(tmp_path: Path) -> None:
    found = loaded(IMPORT, "import torch", tmp_path)
    assert {"selective.optimizer", "pydantic"} <= found
    assert heavy(found) == []


def test_heavy_imports_are_noticed(tmp_path: Path) -> None:
    """The failing twin, by what somebody might write at the top of a file."""
    names = ["yaml", "matplotlib", "torch._dynamo", "torch.distributed.fsdp"]
    names = [name for name in names if not missing([name.partition(".")[0]])]
    found = heavy(loaded(f"{IMPORT}\nimport {', '.join(names)}", "import torch", tmp_path))
    assert set(names) <= set(found)


def test_a_first_step_loads_nothing_heavy(tmp_path: Path) -> None:
    """Whatever the capture, and where a base had to be tried out first."""
    assert heavy(loaded(STEPS, PREPARE, tmp_path)) == []
