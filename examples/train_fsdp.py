"""FSDP2: a GPT of any size under `fully_shard`, with checkpoints that another number of ranks can load.

Run it alone, or with `torchrun --nproc-per-node N train_fsdp.py --steps 400 --width 512 ...`. It uses NCCL on GPUs,
else gloo. A second run with the same folder, on any number of ranks, goes on from the last whole checkpoint. The data
are real: the source of Python's standard library, in the same batches for any number of ranks.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from selective import Eigenbasis, SelectiveUpdate, param_groups_for
from selective.compare.config import DataConfig, ModelConfig
from selective.compare.data import batch, load
from selective.compare.model import GPT, loss


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 8), ("layers", 2), ("width", 32), ("heads", 2), ("context", 32), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--every", type=int, default=4, help="steps from one checkpoint to the next")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--policy", default="MGUP", help="a kind's name, or JSON")
    parser.add_argument("--rotate", action="store_true", help="precondition matrices, on the side that is not sharded")
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16, reduce and step in float32")
    parser.add_argument(
        "--recompute", action="store_true", help="recompute the activations of blocks in the backward pass"
    )
    parser.add_argument("--compile", action="store_true", help="compile each block")
    parser.add_argument("--replicas", type=int, default=1, help="HSDP: so many replicas, each of which is sharded")
    parser.add_argument("--asynchronous", action="store_true", help="go on while a checkpoint is written")
    parser.add_argument("--cpu", action="store_true", help="take no GPU")
    parser.add_argument(
        "--folder", type=Path, help="folder of checkpoints, which all ranks see; default for a single rank: a new one"
    )
    return parser.parse_args()


def start(cpu: bool) -> torch.device:
    """The process group: torchrun's, or one of this process alone."""
    kind = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if kind == "cuda" else kind)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", **alone)
    return device


def sharded(model: GPT, args: argparse.Namespace, device: torch.device) -> GPT:
    """Shard the blocks first, then the rest, as FSDP2 requires. Recomputing and compiling are inside of the shards."""
    shards = dist.get_world_size() // args.replicas
    shape, names = ((args.replicas, shards), ("replicate", "shard")) if args.replicas > 1 else ((shards,), ("shard",))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    dtype = torch.bfloat16 if args.bfloat16 else None
    within = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    around = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
    for block in model.blocks:
        if args.recompute:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if args.compile:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=within)
    return fully_shard(model, mesh=mesh, mp_policy=around)


def save(folder: Path, step: int, model: GPT, optimizer: SelectiveUpdate, group: Any) -> Future[Any] | None:
    """Save a checkpoint: over a process `group` of its own, in a thread whose end the future is, else at once."""
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    where = folder / f"step-{step}"
    if group is not None:
        return dcp.async_save(parts, checkpoint_id=where, process_group=group)  # type: ignore[return-value]
    dcp.save(parts, checkpoint_id=where)
    return None


def resume(folder: Path, model: GPT, optimizer: SelectiveUpdate) -> int:
    """Load the last whole checkpoint, which has `.metadata`, written last. Returns its step; 0 if there is none."""
    saved_steps = [int(file.parent.name.removeprefix("step-")) for file in folder.glob("step-*/.metadata")]
    if not saved_steps:
        return 0
    optimizer.init_state()  # because loading needs state to load into
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(parts, checkpoint_id=folder / f"step-{max(saved_steps)}")
    set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
    return max(saved_steps)


def main() -> None:
    args = options()
    device = start(args.cpu)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if args.folder is None and ranks > 1:
        raise SystemExit("--folder: all ranks have to write to the same one")
    folder = args.folder or Path(tempfile.mkdtemp())
    text = load(DataConfig(), args.context, args.batch).train
    config = ModelConfig(layers=args.layers, width=args.width, heads=args.heads, context=args.context)
    model = sharded(GPT(config, seed=0).to(device), args, device)
    groups = param_groups_for(model, weight_decay=0.1)
    rotation = Eigenbasis(sides="unsharded") if args.rotate else None
    base = torch.optim.AdamW(groups, lr=args.lr, fused=device.type == "cuda")
    optimizer = SelectiveUpdate(base, policy=args.policy, preconditioner=rotation)
    done = resume(folder, model, optimizer)
    if rank == 0:
        print(optimizer.explain(), f"from step {done} on, {ranks} ranks", sep="\n")
    saving: Future[Any] | None = None
    # The thread that saves talks to other ranks while they train. In one group the two would wait for each other.
    saving_group = dist.new_group(backend="gloo") if args.asynchronous else None
    for step in range(done, args.steps):
        windows = batch(text, 0, step, args.batch, args.context)[rank::ranks].to(device)
        here = loss(model, windows)
        here.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = here.detach().clone()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step + 1} loss {mean.item() / ranks:.6f}")
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            if saving is not None:
                saving.result()  # one at a time
            saving = save(folder, step + 1, model, optimizer, saving_group)
    if saving is not None:
        saving.result()
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        print("ok")


if __name__ == "__main__":
    main()
