"""Starts the processes of a run on this machine, and is what each of them knows of the others."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import IO, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

TIMEOUT = timedelta(seconds=300)  # for a rank that waits for another


@dataclass
class Ranks:
    """The processes of a run, seen from one of them."""

    device: torch.device
    meshes: dict[Any, DeviceMesh] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def size(self) -> int:
        return dist.get_world_size()

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def mesh(self, **dims: int) -> DeviceMesh:
        """A mesh over all ranks with these dimensions. Each is made once, because process groups are expensive."""
        key = tuple(dims.items())
        if key not in self.meshes:
            self.meshes[key] = init_device_mesh(self.device.type, tuple(dims.values()), mesh_dim_names=tuple(dims))
        return self.meshes[key]

    def gathered(self, value: Any) -> list[Any]:
        """The values of all ranks, which can be any objects."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found


def join(cpu: bool = False) -> Ranks:
    """Join the process group that the environment names: NCCL where there are GPUs, else gloo."""
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # it finds gathering over two meshes slow
    on_gpu = torch.cuda.is_available() and not cpu
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    return Ranks(device)


@contextmanager
def deterministic(ranks: Ranks) -> Iterator[None]:
    """Let torch take operations that give the same bits each time, where it has them.

    Otherwise ranks that make the same gradient, as those of tensor parallelism do of an embedding, add it on a GPU in
    different orders, and are apart before an optimizer sees it. Attention stays in any order if it may only warn, so
    that on a GPU it is made of plain products.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(ranks.on_gpu or before, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH) if ranks.on_gpu else nullcontext():
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def is_rank() -> bool:
    """True in a process that `Processes` or torchrun has started."""
    return "RANK" in os.environ


class Processes:
    """Some processes of one command, each with its rank in the environment, as torchrun sets it."""

    def __init__(self, command: Sequence[str], size: int, output: IO[str] | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        shared["PYTHONUNBUFFERED"] = "1"
        shared.setdefault("OMP_NUM_THREADS", "1")
        shared.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for `deterministic`
        self.output = output
        self.processes = [
            subprocess.Popen(
                command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
            )
            for rank in range(size)
        ]  # fmt: skip

    def wait(self, seconds: float) -> int:
        """Wait for all. Returns 0, or the exit code of the first that failed, after which the others are killed."""
        end = time.monotonic() + seconds
        try:
            while True:
                codes = [process.poll() for process in self.processes]
                failed = [code for code in codes if code]
                if failed:
                    return failed[0]
                if all(code == 0 for code in codes):
                    return 0
                if time.monotonic() > end:
                    raise TimeoutError(f"the processes have not ended after {seconds:.0f} s")
                time.sleep(0.05)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill those that still run, as a machine that is lost would: without a chance to tidy up."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()
