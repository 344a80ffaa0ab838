"""The host's time of a step on a GPU, without a GPU: the GPU path on CPU tensors, with launches that do nothing.

It says how much Python a step takes and where, as a multiple of torch's fused AdamW, whose arithmetic is left out in
the same way. It is a little more than on a GPU, where the clock and AdamW's step counts are on the device. What
launches and uploads cost is not in it: `selective bench` measures that.

    python scripts/host_profile.py                      # a row for each policy
    python scripts/host_profile.py MGUP --profile 20    # and the 20 most expensive functions
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from selective import SelectiveUpdate
from selective.kernels import use_backend
from selective.kernels.gpu import launch

POLICIES = ("Cautious", "CautiousMGUP", "AlphaConsistency", "MGUP")
LAYERS, WIDTH = 8, 320  # 75 tensors in four groups, as those of a LLaMA of 34 M parameters, but smaller ones


class Nothing:
    """Takes the place of launches, and counts them."""

    def __init__(self) -> None:
        self.launches = 0

    def run(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        self.launches += programs > 0


def groups_of() -> list[dict[str, Any]]:
    """Matrices, norms, embedding and head, with numbers of their own."""
    shapes = [[(WIDTH, WIDTH)] * 7 * LAYERS, [(WIDTH,)] * (2 * LAYERS + 1), [(500, WIDTH)], [(500, WIDTH)]]
    numbers = [{"weight_decay": 0.1}, {"weight_decay": 0.0}, {"weight_decay": 0.0, "lr": 2e-3}, {"weight_decay": 0.1}]
    return [
        {"params": [torch.nn.Parameter(torch.randn(shape)) for shape in group], **own}
        for group, own in zip(shapes, numbers, strict=True)
    ]


def leave_out_arithmetic(nothing: Nothing) -> None:
    """Let no launch of ours and no multi-tensor function of torch do anything, and make no zeros."""
    launch.run = nothing.run
    torch.zeros = torch.empty  # on a GPU a fill, which the host does not wait for
    many: Any = torch
    many._fused_adamw_ = many._foreach_add_ = lambda *arguments, **options: None


def microseconds(optimizer: Optimizer, params: Sequence[Tensor], grads: Sequence[Tensor]) -> float:
    """This thread's time in one step, with gradients at new places in memory."""
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.clone()
    began = time.thread_time_ns()
    optimizer.step()
    return (time.thread_time_ns() - began) / 1e3


def rows(policies: Sequence[str], steps: int, functions: int) -> None:
    nothing = Nothing()
    torch.set_num_threads(1)
    groups = groups_of()
    params = [p for group in groups for p in group["params"]]
    grads = [torch.randn_like(p) for p in params]
    bare = AdamW(groups, lr=1e-3, fused=True)
    contenders = {
        (policy, statistics): SelectiveUpdate(AdamW(groups, lr=1e-3, fused=True), policy=policy, statistics=statistics)
        for policy in policies
        for statistics in (True, False)
    }
    leave_out_arithmetic(nothing)
    print(f"{'policy':20}{'statistics':>11}{'us':>8}{'x torch':>9}{'launches':>10}")
    for (policy, statistics), optimizer in contenders.items():
        for each in (optimizer, bare) * 5:
            microseconds(each, params, grads)
        nothing.launches = 0
        ours, theirs = [], []
        for _ in range(steps):  # in turns, so that both have the same share of a busy machine
            ours.append(microseconds(optimizer, params, grads))
            theirs.append(microseconds(bare, params, grads))
        low = len(ours) // 10  # the lowest tenth: what is above was interrupted
        mine, base = sorted(ours)[low], sorted(theirs)[low]
        launches = nothing.launches / steps
        print(f"{policy:20}{'on' if statistics else 'off':>11}{mine:8.0f}{mine / base:9.2f}{launches:10.0f}")
        if functions:
            profiler = cProfile.Profile(time.thread_time)
            for _ in range(steps):
                profiler.enable()
                optimizer.step()
                profiler.disable()
            pstats.Stats(profiler).sort_stats("tottime").print_stats(functions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", nargs="*", default=POLICIES)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="also print the N most expensive functions")
    options = parser.parse_args()
    with use_backend("gpu"):
        rows(options.policies, options.steps, options.profile)


if __name__ == "__main__":
    main()
