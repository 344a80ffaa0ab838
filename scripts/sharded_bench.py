"""Times steps under FSDP2: torch's fused AdamW, and `SelectiveUpdate` around it, in turns in one run.

torchrun --nproc-per-node N scripts/sharded_bench.py [--layers 12 --width 1024 ...]

Rank 0 prints a line of JSON for each contender: the median milliseconds of a whole training step (forward, backward,
optimizer) and of the optimizer's step alone, their ratios to AdamW's, and the collectives and bytes of an optimizer's
step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from selective import MGUP, Cautious, CautiousMGUP, Eigenbasis, SelectiveUpdate
from selective.bench.traffic import all_reduces
from selective.compare.config import ModelConfig
from selective.compare.model import GPT, loss

Make = Callable[[torch.optim.Optimizer], torch.optim.Optimizer]
CONTENDERS: dict[str, Make] = {
    "torch AdamW": lambda base: base,
    "agreement": lambda base: SelectiveUpdate(base, policy=CautiousMGUP(), statistics=False),
    "agreement, mean-preserving": lambda base: SelectiveUpdate(base, policy=Cautious(), statistics=False),
    "exact top-K": lambda base: SelectiveUpdate(base, policy=MGUP(), statistics=False),
    "rotated, unsharded side": lambda base: SelectiveUpdate(
        base, preconditioner=Eigenbasis(sides="unsharded", refresh_every=10**6, stagger=False), statistics=False
    ),
}


class Contender:
    """A sharded model and its optimizer."""

    def __init__(self, make: Make, config: ModelConfig, device: torch.device) -> None:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        self.device, self.model = device, GPT(config, seed=0).to(device)
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = make(torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True))
        self.whole: list[float] = []
        self.own: list[float] = []

    def step(self, windows: torch.Tensor) -> None:
        began = self._now()
        loss(self.model, windows).backward()
        before = self._now()
        self.optimizer.step()
        after = self._now()
        self.optimizer.zero_grad()
        self.whole.append((after - began) * 1e3)
        self.own.append((after - before) * 1e3)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def measured(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    config = ModelConfig(layers=args.layers, width=args.width, heads=args.heads, context=args.context)
    contenders = {name: Contender(make, config, device) for name, make in CONTENDERS.items()}
    draws = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(args.warmup + args.steps):
        windows = torch.randint(256, (args.batch, args.context + 1), generator=draws).to(device)
        for contender in contenders.values():  # in turns, so that all meet the same conditions
            contender.step(windows)
    rows = []
    plain = contenders["torch AdamW"]
    for name, contender in contenders.items():
        with all_reduces() as sent:
            contender.step(windows)
        whole, optimizer_only = (
            statistics.median(times[args.warmup : -1]) for times in (contender.whole, contender.own)
        )
        ratios = [
            statistics.median(a / b for a, b in zip(mine[args.warmup : -1], theirs[args.warmup :], strict=False))
            for mine, theirs in ((contender.whole, plain.whole), (contender.own, plain.own))
        ]
        row = {"contender": name, "step_ms": whole, "optimizer_ms": optimizer_only, "step_ratio": ratios[0]}
        rows.append({**row, "optimizer_ratio": ratios[1], "collectives": len(sent), "bytes": sum(sent)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 12, "width": 1024, "heads": 16, "context": 512, "batch": 8, "steps": 30, "warmup": 5}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if kind == "cuda" else kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    rows = measured(args, device)
    if dist.get_rank() == 0:
        about = {"ranks": dist.get_world_size(), "device": torch.cuda.get_device_name() if kind == "cuda" else "CPU"}
        print(json.dumps({**about, "torch": torch.__version__, **vars(args)}))
        for row in rows:
            print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # when the interpreter ends, gloo's threads have aborted processes that had all results
