"""Replicas over gloo: a process for each rank, which trains all configurations one after the other.

It runs as a script, imports torch once for all configurations and ranks, and forks the ranks, which write to files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from selective import SelectiveUpdate
from selective.state.entries import SEED

STEPS = 50
Configuration = dict[str, Any]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(6, 8), nn.Linear(8, 3), nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x))) * self.scale


def digest(optimizer: SelectiveUpdate) -> str:
    """A digest of parameters and all state but the seed, which differs between the ranks of one of the twins."""
    found = hashlib.sha256()
    state = optimizer.state_dict()["state"]
    for index, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        found.update(p.detach().numpy().tobytes())
        for key, value in sorted(state.get(index, {}).items()):
            if key != SEED:
                found.update(key.encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()


def trained(rank: int, how: Configuration) -> list[str]:
    """The digests after some of the steps, which must be the same on all ranks."""
    torch.manual_seed(0)
    model = Net()
    torch.manual_seed(1000 + rank)  # a seed for each rank: policies must not draw from it
    ours: nn.Module = model
    if how.get("ddp", True):
        ours = DistributedDataParallel(model, static_graph=how.get("static_graph", False))
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seed = rank if how.get("seed_of_rank") else 0
    optimizer = SelectiveUpdate(base, policy=how["policy"], preconditioner=how.get("preconditioner"), seed=seed)
    found = []
    steps = STEPS + (3 * rank if how.get("join") else 0)  # uneven: ranks that are done shadow the others' steps
    with ours.join() if how.get("join") else nullcontext():  # type: ignore[operator]
        for step in range(steps):
            torch.rand(1 + rank)  # the global generators drift apart
            for part in range(2 if how.get("no_sync") else 1):
                x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1000 * rank + 10 * step + part))
                silent = how.get("no_sync") and part == 0
                with ours.no_sync() if silent else nullcontext():  # type: ignore[operator]
                    ours(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step in (0, 9, STEPS - 1):
                found.append(digest(optimizer))
    return found


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    configurations = json.loads((folder / "configurations.json").read_text())
    found = {name: trained(rank, how) for name, how in configurations.items()}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # when the interpreter ends, gloo's threads have aborted processes that had all results


def train_replicas(world: int, configurations: dict[str, Configuration], folder: Path) -> dict[str, list[list[str]]]:
    """The digests of every rank, for each configuration."""
    (folder / "configurations.json").write_text(json.dumps(configurations))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a fork copies one thread only
    with open(folder / "all.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, str(world), str(folder)], stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True, env=environment,
        )  # fmt: skip
    try:
        code = process.wait(240)
    finally:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert code == 0, (folder / "all.log").read_text()
    each = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
    return {name: [found[name] for found in each] for name in configurations}


def fork_ranks(world: int, folder: Path) -> int:
    """Returns how many ranks have failed."""
    for rank in range(world):
        if os.fork() == 0:
            try:
                main(rank, world, folder)
            except Exception:
                traceback.print_exc()
                os._exit(1)
    return sum(os.wait()[1] != 0 for _ in range(world))


if __name__ == "__main__":
    sys.exit(fork_ranks(int(sys.argv[1]), Path(sys.argv[2])))
