"""The step over chunks that stay in the cache: one pass over the memory if the mask is local, two if it is not.

One pass (everything, agreement, Bernoulli or a sampled threshold, with fixed strengths): moments, mask and parameter
of a chunk are done while it is in the cache. Extra memory: the chunk buffers, at most 13 of 0.5 MiB, with exact top-K
10 MiB more, and with a control two of up to 4 MiB. They are kept, and each thread that steps has its own. Where torch
has more than one thread for an operation, the chunk buffers are two, three or four times as large; with a control,
those of its passes are twice as large as that.

Two passes (exact top-K; strengths that need a sum): the first moves the moments, leaves d = -u in a scratch tensor
and counts; the second applies the mask. A matched control draws between the two, and multiplies d by the mask in a pass
of its own, which adds up the norm. Small tensors are drawn together: as many as are no larger than the largest one.
Extra memory, freed when the call ends, is that of the call's largest tensor, in bytes an element:

- 4 for d (8 in float64; 0 if a capture already holds d as float32);
- 1 for marks, with exact top-K, if a strength reads them again, or if a control draws;
- 4 for top-K by a momentum score, and 4 for top-K that keeps the norm of the momentum;
- about 0.5 for the list inside the bracket, as for that of a control, up to 24 where very many scores are equal, and 4
  to 12 if a bracket has missed.

Non-contiguous tensors are copied while they are stepped. Small ones without a mask are stepped together: `together.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..spec import Draw, Item, StepSpec, Sums, check_kinds
from .chunks import Scratch
from .draw import draw as draw_marks
from .draw import room
from .step import Step
from .together import is_uniform, step_together

TOGETHER = 1 << 22  # elements of the controls that are drawn together, at most: with fewer, more calls of operations


def _run(batch: list[Step], draw: Draw, scratch: Scratch) -> list[Sums | None]:
    """Step the tensors of a batch: controls that are drawn together, or one tensor without a control."""
    if batch[0].matched is None:
        return [step.run() for step in batch]
    targets = [step.prepare() for step in batch]
    draw_marks(draw, targets, scratch.get("marks", batch[-1].offset + room(batch[-1].numel), torch.uint8))
    # Backwards: what the last tensors have left is still in the cache.
    return [step.finish() for step in reversed(batch)][::-1]


def _batches(items: Sequence[Item], spec: StepSpec, scratch: Scratch) -> Iterator[list[Step]]:
    """The steps of these tensors, in their order; those that lie side by side in `scratch` together."""
    batch: list[Step] = []
    for item in items:
        step = Step(item, spec, scratch)
        if batch:
            end = batch[-1].offset + room(batch[-1].numel)
            together = batch[0].matched is not None and step.matched is not None
            if together and end + room(step.numel) <= min(scratch.largest, TOGETHER):
                step.offset = end
            else:
                yield batch
                batch = []
        batch.append(step)
    if batch:
        yield batch


def selective_step(items: Sequence[Item], spec: StepSpec) -> list[Sums] | None:
    """Steps 5 to 7 of these tensors, in place. See `selective.kernels.selective_step`."""
    check_kinds("the CPU", spec)
    if is_uniform(spec):
        items = step_together(items, spec)
    scratch = Scratch()
    scratch.largest = max((item.param.numel() for item in items), default=0)
    if spec.selection.control is not None:
        scratch.largest = room(scratch.largest)
    sums = [s for batch in _batches(items, spec, scratch) for s in _run(batch, spec.draw, scratch)]
    return [s for s in sums if s is not None] if spec.statistics else None
