"""Records launches in a CUDA graph. `graphs.py` says when.

Note [nobody waits]: `torch.cuda.graph` synchronises with the device and empties torch's caches. Here neither happens,
because nothing that a graph records runs before its first replay. Recording needs a stream that is not the default one.
It is one of torch's pool, as that of `torch.cuda.graph` is. It waits for the current stream, and that for it, on the
device alone: some versions of torch fill the default generator's seed in when a capture begins, and work that was
launched before may still read it. The mode is thread_local: other threads go on allocating and launching. With those
versions, a thread that draws random numbers on the device in this moment gets torch's error.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..lasting import lasting
from .direct import DirectLaunches
from .graphs import Launch, Sums

MARGIN = 64 << 20  # bytes that have to be free beside those that launches need: torch takes memory in larger pieces

_streams: dict[torch.device, torch.cuda.Stream] = {}  # by device: what is recorded there
_failed: list[object] = []  # graphs whose recording failed: torch's allocator may still point to them


class CudaRecording:
    """A CUDA graph of launches, with the memory that they work in.

    The memory is used by one replay at a time: one in another stream waits for the last one.
    """

    def __init__(self, graph: Any, sums: Sums, device: torch.device, nbytes: int) -> None:
        self.device, self.nbytes = device, nbytes
        self._graph, self._sums, self._stream = graph, sums, torch.cuda.current_stream(device)

    def replay(self) -> Sums:
        """Replay the graph in the current stream. Returns copies of the sums, which the next replay overwrites."""
        stream = torch.cuda.current_stream(self.device)
        if stream != self._stream:
            stream.wait_stream(self._stream)
            self._stream = stream
        self._graph.replay()
        return [None if sums is None else sums.clone() for sums in self._sums]


class CudaRecorder:
    """Records in a CUDA graph what `direct_launches` launches. See `graphs.Recorder`."""

    def __init__(self, direct_launches: DirectLaunches) -> None:
        self._direct = direct_launches

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def settings(self) -> object | None:
        """The settings of Triton that kernels are compiled for.

        None where launches have to go through Triton's dispatcher, and where hooks are called for each launch: a replay
        calls none.
        """
        return None if self._direct.has_launch_hooks() else self._direct.settings

    def dispatched(self) -> int:
        return self._direct.dispatched

    def record(self, device: torch.device, launch: Launch, nbytes: int) -> CudaRecording:
        free, _ = torch.cuda.mem_get_info(device)
        if free < nbytes + MARGIN:
            raise RuntimeError(f"of the device's memory {free >> 20} MiB are free")
        before = torch.cuda.memory_reserved(device)
        graph = torch.cuda.CUDAGraph()
        current, aside = torch.cuda.current_stream(device), _stream_of(device)
        aside.wait_stream(current)
        with lasting(), _without_collections(), torch.cuda.stream(aside):
            sums = _captured(graph, device, launch)
        current.wait_stream(aside)
        taken = torch.cuda.memory_reserved(device) - before
        return CudaRecording(graph, sums, device, max(taken, nbytes))


def _captured(graph: Any, device: torch.device, launch: Launch) -> Sums:
    """Capture the launches on the current stream. Returns their sums, which replays fill in."""
    pool = torch.cuda.graph_pool_handle()
    try:
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            sums, _ = launch()
        finally:
            graph.capture_end()
    except BaseException:
        _failed.append(graph)
        _leave_pool(device, pool)
        raise
    return sums


def _leave_pool(device: torch.device, pool: Any) -> None:
    """Tell torch's allocator that a capture has ended: neither `capture_begin` nor `capture_end` does, if it fails.

    Until it is told, it frees no memory that was used by several streams.
    """
    functions: Any = torch._C
    try:
        functions._cuda_endAllocateToPool(device.index, pool)
    except RuntimeError as error:
        if "not currently recording" not in str(error):  # it was told
            raise
    else:
        functions._cuda_releasePool(device.index, pool)


@contextmanager
def _without_collections() -> Iterator[None]:
    """A context without garbage collections: one may destroy an event or a graph, which CUDA refuses in a capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _stream_of(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
