"""Eigenvectors of stacks of symmetric matrices; on a GPU, several matrices at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

THREADS = 8
"""Matrices that a GPU solves at a time. cuSOLVER leaves most of a GPU idle, and works on the host in between."""
SOLVED_AT_ONCE = 32
"""Most rows of a matrix for which torch hands a whole stack to cuSOLVER. It solves larger ones one after the other."""


def eigenvectors(stack: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `torch.linalg.eigh` does for symmetric matrices [batch, n, n], bit for bit.

    These are the eigenvalues [batch, n] in rising order and the eigenvectors [batch, n, n], one a column. On a GPU up
    to `THREADS` matrices are solved at a time, each by a thread on a stream of its own. The current stream waits for
    all of them.

    Raises `torch.linalg.LinAlgError`, as torch does, if the solver does not converge for a matrix.
    """
    if not stack.is_cuda or len(stack) == 1 or stack.shape[-1] <= SOLVED_AT_ONCE:
        return torch.linalg.eigh(stack)
    return solve_in_threads(stack, THREADS)


def solve_in_threads(stack: Tensor, threads: int) -> tuple[Tensor, Tensor]:
    """Solve the matrices of a stack in so many threads. Arguments, result and error are those of `eigenvectors`."""
    values, vectors = stack.new_empty(stack.shape[:-1]), torch.empty_like(stack)
    inference = torch.is_inference_mode_enabled()  # which threads don't take over
    _solve(
        stack, values, vectors, [0], inference
    )  # the first call of a process loads the library, which two threads must not do
    rest = range(1, len(stack))
    parts = [rest[number::threads] for number in range(min(threads, len(rest)))]
    # The threads have ended before the current stream waits for theirs, also after an error.
    with _streams_for(stack, len(parts)) as streams, ThreadPoolExecutor(max(1, len(parts))) as pool:
        jobs = [
            pool.submit(_solve, stack, values, vectors, part, inference, stream)
            for part, stream in zip(parts, streams, strict=True)
        ]
        for job in jobs:
            job.result()
    return values, vectors


def _solve(
    stack: Tensor,
    values: Tensor,
    vectors: Tensor,
    numbers: Sequence[int],
    inference: bool,
    stream: torch.cuda.Stream | None = None,
) -> None:
    """Solve the matrices of these numbers in a stream, and write the results to their places."""
    with torch.inference_mode(inference), torch.no_grad(), torch.cuda.stream(stream):  # no stream: the current one
        for number in numbers:
            solved = torch.linalg.eigh(stack[number])
            values[number].copy_(solved.eigenvalues)
            vectors[number].copy_(solved.eigenvectors)


@contextmanager
def _streams_for(stack: Tensor, count: int) -> Iterator[Sequence[torch.cuda.Stream | None]]:
    """Yield streams that come after the current one, which comes after them in the end; None for each on a CPU."""
    if not stack.is_cuda:
        yield [None] * count
        return
    current, streams = torch.cuda.current_stream(stack.device), _streams(stack.device)[:count]
    for stream in streams:
        stream.wait_stream(current)
    try:
        yield streams
    finally:
        for stream in streams:
            current.wait_stream(stream)


@cache
def _streams(device: torch.device) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(device) for _ in range(THREADS)]
