"""A script that is one rank of `replicas_stay_identical`: it trains, and writes its parameters to a file."""

from __future__ import annotations

import json
import os
import pickle
import random
import sys
from pathlib import Path

UNKNOWN_HERE = 3  # the exit code if the subject can't be unpickled


def main(rank: int, world: int, folder: Path) -> None:
    """Train the pickled subject under DDP, and save the parameters in `{rank}.pt`."""
    sys.path[:] = json.loads((folder / "path.json").read_text())  # so that this process can import what its parent can
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from selective.testing.harness import values
    from selective.testing.model import ConformanceModel

    torch.set_num_threads(1)
    try:
        subject = pickle.loads((folder / "subject").read_bytes())
    except Exception as error:  # unpickling imports and runs a stranger's code, which may raise anything
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(UNKNOWN_HERE)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    torch.manual_seed(1_000 + rank)  # each rank has its own seed, as for data loading and dropout
    random.seed(rank)
    model = ConformanceModel(subject.model, late=False)
    optimizer = subject.build(list(model.parameters()))
    replica = DistributedDataParallel(model)
    for step in range(6):
        torch.rand(1 + rank)
        optimizer.zero_grad()
        replica(step + 100 * rank).backward()
        optimizer.step()
    torch.save(values(model), folder / f"{rank}.pt")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # when the interpreter ends, gloo's threads have aborted processes that had all results


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
