"""Compares a sharded step with the step of whole tensors: the same bits, its time, its collectives.

    torchrun --standalone --nproc-per-node 2 scripts/sharded.py --shapes llama-60m

It uses NCCL on GPUs and gloo elsewhere. Every rank keeps one set of parameters whole and one cut by rows over all
ranks, gives both the same gradients, and compares them after a few steps (`same bits`, on the shapes of `--check`). On
a CPU both sides use the reference, because the CPU's kernels for whole tensors round differently. Then it times steps
on shards, in turns, against torch's fused AdamW on the same shards. The time is the median of `--rounds` on the
slowest rank. `host waits` says if a step makes the host wait for the GPU. `launches` counts the kernels, copies and
fills that a step puts on the GPU, those of the collectives included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from selective import MGUP, Cautious, CautiousMGUP, Policy, RandomMask, SelectiveUpdate
from selective.bench.clock import clock_of
from selective.bench.rotations import TimedCall
from selective.bench.shapes import SHAPES
from selective.bench.traffic import all_reduces
from selective.kernels import use_backend

POLICIES: dict[str, Policy] = {
    "CautiousMGUP": CautiousMGUP(), "RandomMask": RandomMask(), "Cautious": Cautious(), "MGUP": MGUP(),
}  # fmt: skip


def parameters(shapes: list[tuple[int, ...]], mesh: Any, device: str, cut: bool) -> list[nn.Parameter]:
    """Parameters with the same values on every rank, whole or cut by rows."""
    values = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        whole = torch.randn(shape, generator=values, device=device) * 0.02
        params.append(nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None) if cut else whole))
    return params


def give_gradients(params: list[nn.Parameter], step: int, device: str) -> None:
    values = torch.Generator(device).manual_seed(1 + step)
    for p in params:
        whole = torch.randn(p.shape, generator=values, device=device)
        if isinstance(p, DTensor):
            whole = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
        p.grad = whole


def same_bits(policy: Policy, shapes: list[tuple[int, ...]], mesh: Any, device: str) -> bool:
    """True if shards and whole tensors are the same after three steps, on every rank."""
    runs: list[list[Tensor]] = []
    for cut in (False, True):
        params = parameters(shapes, mesh, device, cut)
        optimizer = SelectiveUpdate(torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1), policy=policy)
        for step in range(3):
            give_gradients(params, step, device)
            with use_backend("reference" if device == "cpu" else "auto"):
                optimizer.step()
        runs.append([p.full_tensor() if isinstance(p, DTensor) else p for p in params])
    same = torch.tensor(all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), dtype=torch.int32, device=device)
    dist.all_reduce(same, op=dist.ReduceOp.MIN)
    return bool(same)


def sent_by(step: Callable[[], Any]) -> tuple[int, int]:
    """The number of all-reduces of one step, and their bytes."""
    with all_reduces() as sizes:
        step()
    return len(sizes), sum(sizes)


def waits(step: Callable[[], Any], device: str) -> str:
    """ "yes" with the reason, or "no": does a step make the host wait for the GPU?"""
    if device == "cpu":
        return "-"
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return f"yes ({str(error).splitlines()[0][:60]})"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no"


def launched_by(step: Callable[[], Any], device: str) -> str:
    """The number of launches of one step, or "-" if a rank can't count: all ranks must take the same steps."""
    clock = clock_of(device.partition(":")[0])
    probe = TimedCall(lambda: torch.zeros(1, device=device))
    able = torch.tensor(int(clock.launches(probe) is not None), device=device)
    dist.all_reduce(able, op=dist.ReduceOp.MIN)
    counts = clock.launches(TimedCall(step)) if bool(able) else None
    return "-" if counts is None else str(sum(counts.values()))


def timed(steps: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, float]:
    """The milliseconds of each step function, called in turns: the median of the rounds on the slowest rank."""
    milliseconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            dist.barrier()
            if device != "cpu":
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            if device != "cpu":
                torch.cuda.synchronize()
            milliseconds[name].append((time.perf_counter() - start) * 1e3)
    medians = torch.tensor([statistics.median(times) for times in milliseconds.values()], device=device)
    dist.all_reduce(medians, op=dist.ReduceOp.MAX)
    return dict(zip(steps, medians.tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--shapes", choices=sorted(SHAPES), default="llama-60m")
    parser.add_argument("--check", choices=sorted(SHAPES), default="transformer-30m")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--tensors", type=int, default=None, help="number of tensors to take of the shapes")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    device = f"cuda:{dist.get_rank() % torch.cuda.device_count()}" if gpu else "cpu"
    if gpu:
        torch.cuda.set_device(device)
    mesh = init_device_mesh("cuda" if gpu else "cpu", (dist.get_world_size(),))
    checked, shapes = SHAPES[options.check][: options.tensors], SHAPES[options.shapes][: options.tensors]
    equal = {name: same_bits(policy, checked, mesh, device) for name, policy in POLICIES.items()}

    def over(make: Callable[[list[nn.Parameter]], Any]) -> Any:
        params = parameters(shapes, mesh, device, cut=True)
        give_gradients(params, 0, device)
        optimizer = make(params)
        optimizer.step()  # state, tables and compiled kernels
        return optimizer.step

    steps: dict[str, Any] = {"AdamW fused": over(lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True))}
    for name, policy in POLICIES.items():
        for suffix, collected in (("", False), (", statistics", True)):
            steps[name + suffix] = over(
                lambda p, policy=policy, collected=collected: SelectiveUpdate(
                    torch.optim.AdamW(p, lr=1e-3), policy=policy, statistics=collected
                )
            )
    sent, waited = {n: sent_by(s) for n, s in steps.items()}, {n: waits(s, device) for n, s in steps.items()}
    times = timed(steps, options.rounds, device)
    launched = {name: launched_by(step, device) for name, step in steps.items()}
    if dist.get_rank() == 0:
        name = torch.cuda.get_device_name() if gpu else "CPU"
        print(
            f"{dist.get_world_size()} ranks, {name}, torch {torch.__version__}, {options.shapes}, {len(shapes)} tensors"
        )
        print("| step | ms | × AdamW fused | launches | all-reduces | bytes | host waits | same bits |")
        print("|" + " --- |" * 8)
        for step, ms in times.items():
            ratio, (count, size) = ms / times["AdamW fused"], sent[step]
            bits = {True: "yes", False: "NO"}.get(equal.get(step.partition(",")[0]), "-")  # type: ignore[arg-type]
            sending = f"{launched[step]} | {count} | {size:,} | {waited[step]}"
            print(f"| {step} | {ms:.2f} | {ratio:.2f} | {sending} | {bits} |")
    dist.barrier()
    dist.destroy_process_group()
    if not all(equal.values()):
        raise SystemExit("shards and whole tensors differ")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # when the interpreter ends, gloo's threads have aborted processes that had all results
