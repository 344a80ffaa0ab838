"""A recorder for machines without a GPU: it records launches with the arguments that they had, as a CUDA graph does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from selective.kernels.gpu import launch
from selective.kernels.gpu.graphs import Launch, Sums

Action = Callable[[], Any]


class Actions(TorchDispatchMode):
    """Collects launches of kernels without making them, and operations of torch that fill memory."""

    enabled = False  # the launches are no direct ones

    def __init__(self) -> None:
        super().__init__()
        self.list: list[Action] = []

    def launch(
        self, kernel: Any, programs: int, arguments: Any, options: dict[str, Any], constants: dict[str, Any]
    ) -> None:
        self.list.append(lambda: kernel[(programs,)](*arguments, **options, **constants))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.zero_.default:
            self.list.append(lambda: func(*args))
        return func(*args, **(kwargs or {}))


class ListRecording:
    """A list of actions. Replaying repeats them, with what was in their arguments when they were recorded."""

    def __init__(self, actions: list[Action], sums: Sums, device: torch.device, nbytes: int) -> None:
        self.actions, self.sums, self.device, self.nbytes = actions, sums, device, nbytes
        self.replays = 0

    def replay(self) -> Sums:
        for action in self.actions:
            action()
        self.replays += 1
        return [None if sums is None else sums.clone() for sums in self.sums]


class ListRecorder:
    """Records lists of actions. Its attributes say what there is to know; tests change them."""

    def __init__(self, more_bytes: int = 0) -> None:
        self.capturing, self.now, self.compiled = False, ("settings",), 0
        self.failure: Exception | None = None
        self.more_bytes = more_bytes
        self.recordings: list[ListRecording] = []

    def is_capturing(self) -> bool:
        return self.capturing

    def settings(self) -> object | None:
        return self.now

    def dispatched(self) -> int:
        return self.compiled

    def record(self, device: torch.device, launch_all: Launch, nbytes: int) -> ListRecording:
        if self.failure is not None:
            raise self.failure
        actions = Actions()
        with patch.object(launch, "DIRECT", actions), actions:
            sums, _ = launch_all()
        self.recordings.append(ListRecording(actions.list, sums, device, nbytes + self.more_bytes))
        return self.recordings[-1]
