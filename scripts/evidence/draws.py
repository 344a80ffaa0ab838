"""Draws that seed and step fix, and their way to a device."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator(words: str) -> torch.Generator:
    """A generator on the host that these words seed."""
    digest = hashlib.sha256(words.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def of_epoch(count: int, batch_size: int, seed: int, step: int) -> Tensor:
    """The numbers of the examples in a step, int64 (batch_size,).

    An epoch is a permutation that the seed fixes, and what is left of it is dropped.
    """
    epoch, place = divmod(step, count // batch_size)
    order = torch.randperm(count, generator=generator(f"epoch {seed} {epoch}"))
    return order[place * batch_size : (place + 1) * batch_size]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device. The host does not wait for what the device has still to do."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # from pageable memory it would wait for all kernels
