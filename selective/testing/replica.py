"""One rank of `replicas_stay_identical`: run as a script, which trains and leaves its parameters in a file."""

from __future__ import annotations

import json
import os
import pickle
import random
import sys
from pathlib import Path

UNKNOWN_HERE = 3  # the exit code where the subject can't be unpickled


def main(rank: int, world: int, folder: Path) -> None:
    """Train the pickled subject under DDP; `{rank}.pt` holds the parameters."""
    sys.path[:] = json.loads((folder / "path.json").read_text())  # what could be imported there can be here
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from selective.testing.harness import values
    from selective.testing.model import ConformanceModel

    torch.set_num_threads(1)
    try:
        subject = pickle.loads((folder / "subject").read_bytes())
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(UNKNOWN_HERE)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    torch.manual_seed(1_000 + rank)  # each rank's own, as data loading and dropout have it
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
    os._exit(0)  # gloo's threads, at the interpreter's end, have been seen to abort a process that had all results


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
