"""What a user sets for the whole process, where it must not reach what we make for ourselves.

A base's own step and a policy's own code run under the user's settings, as they do without us. Everything of ours names
its device and its dtype, and nothing has to be set back for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from selective.kernels.lasting import lasting


@contextmanager
def settings_of_torch() -> Iterator[None]:
    """For what is remembered of a class of optimizers, and holds after the user's region as well.

    No inference mode, no autocast, and a default device that holds numbers.
    """
    with ExitStack() as stack:
        stack.enter_context(lasting())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type == "meta":
            stack.enter_context(torch.device("cpu"))
        yield
