"""Tensors that are kept from step to step, made inside of a user's `torch.inference_mode()`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def lasting() -> Iterator[None]:
    """A context that leaves `torch.inference_mode()`: tensors made in it can be written to after that mode, too.

    torch refuses to write to tensors that were made in inference mode. Buffers, tables and state that are kept are made
    in this context, because otherwise one step in that mode would spoil all later ones.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():  # in this order: the first one enables gradients
        yield
