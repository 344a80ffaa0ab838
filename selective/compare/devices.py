"""The devices of a comparison's workers, and how many workers there are."""

from __future__ import annotations

import os

import torch

from selective.compare.config import CompareConfig


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices(config: CompareConfig) -> list[str]:
    """The device of each worker, in turn: all GPUs for "cuda", else the one that is configured."""
    count = torch.cuda.device_count() if config.device == "cuda" else 0
    return [f"cuda:{index}" for index in range(count)] if count > 1 else [config.device]


def worker_count(config: CompareConfig) -> int:
    """The configured number of workers. Without one: a worker for each GPU, or for each `threads` cores of a CPU."""
    if config.workers is not None:
        return config.workers
    return max(1, cores() // config.threads) if torch.device(config.device).type == "cpu" else len(devices(config))
