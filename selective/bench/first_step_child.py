"""One fresh process of the first-step benchmark, run as a script so that nothing is imported before it is timed.

    python first_step_child.py BASE MODEL POLICY [THREADS [CLOCK]]

POLICY is a kind's name, or "none" for the base by itself, without `import selective`. CLOCK is the name of a function
of Python's `time`. It prints one line of JSON. Parameters and gradients are random. Building the base is not timed,
because torch imports much of its compiler there.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

NOTHING = "none"


def shapes_of(model: str) -> list[tuple[int, ...]]:
    """The shapes of `small`, two linear layers, or `gpt`, the 148 tensors of GPT-2, narrow to keep arithmetic short."""
    if model == "small":
        return [(16, 8), (16,), (4, 16), (4,)]
    width = 128
    layer = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    block = [shape for rows, columns in layer for shape in ((rows, columns), (rows,))] + [(width,)] * 4
    return [(512, width), (128, width), *block * 12, (width,), (width,)]


def base_of(name: str, params: list[Any]) -> Any:
    """A base of torch, or one of the unknown classes `own` and `own-norm`, which wrapping has to try out.

    `own-norm` takes delta capture.
    """
    import torch

    if hasattr(torch.optim, name):
        return getattr(torch.optim, name)(params, lr=1e-3)
    looks = name == "own-norm"

    class Own(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 1e-3, "weight_decay": 0.01, "beta": 0.9})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in (p for p in group["params"] if p.grad is not None):
                    moment = self.state[p].setdefault("moment", torch.zeros_like(p))
                    moment.lerp_(p.grad, 1 - group["beta"])
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(moment * (group["lr"] * (p.norm() if looks else 1.0)))

    return Own(params)


def main(
    base_name: str, model: str, policy: str, threads: str = "", clock_name: str = "perf_counter"
) -> dict[str, Any]:
    """Time the imports, the construction and the first step. Returns seconds and facts about the base."""
    clock, report = getattr(time, clock_name), {}
    start = clock()
    import torch

    report["import torch"] = clock() - start
    if policy != NOTHING:
        start = clock()
        import selective

        report["import selective"] = clock() - start
    if threads:
        torch.set_num_threads(int(threads))
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes_of(model)]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer = base_of(base_name, params)
    had_triton = "triton" in sys.modules
    start = clock()
    if policy != NOTHING:
        optimizer = selective.SelectiveUpdate(optimizer, policy=policy)
    report["construct"] = clock() - start
    start = clock()
    optimizer.step()
    report["step"] = clock() - start
    report.update(tensors=len(params), triton="triton" in sys.modules and not had_triton)
    if policy != NOTHING:
        capture = optimizer.groups.plans[0].capture
        report.update(way=capture.way, source=capture.facts.source)
    return report


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
