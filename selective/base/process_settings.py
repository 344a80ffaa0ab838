"""A context without the user's process-wide torch settings, for measurements that are remembered.

A base's own step and a policy's own code run under the user's settings, as they do without us. Our own code names its
device and dtype everywhere, and does not need this context.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from selective.kernels.lasting import lasting


@contextmanager
def settings_of_torch() -> Iterator[None]:
    """Leave inference mode and autocast, and replace a default device "meta", which holds no numbers, by the CPU."""
    with ExitStack() as stack:
        stack.enter_context(lasting())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type == "meta":
            stack.enter_context(torch.device("cpu"))
        yield
