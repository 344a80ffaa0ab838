"""`top_k` of tensors of scores by the GPU path: drawn ones, with everything awkward in them."""

from __future__ import annotations

import math

import pytest
import torch
from gpu_support import BF16, CUDA, F16, F32, few_samples, missing_brackets, short_lists
from hypothesis import given, settings
from hypothesis import strategies as st

from selective.kernels import (
    top_k,
)

# few values, so that ties are many, and all the awkward ones
awkward = st.sampled_from([0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 1e-45, -1e-45, 3.4e38, 0.5])
scores = st.lists(st.one_of(awkward, st.floats(width=32)), max_size=40)


def sorted_out(score: torch.Tensor, k: int) -> torch.Tensor:
    return top_k(score.cpu(), k, backend="reference")


@settings(max_examples=600 if CUDA else 30, deadline=None)
@given(values=scores, k=st.integers(-1, 42), dtype=st.sampled_from([F32, F32, BF16, F16]))
def test_is_the_stable_sort(device, transcription, values, k, dtype):
    score = torch.tensor(values, dtype=F32).to(dtype)
    chosen = top_k(score.to(device), k, backend="gpu")
    assert chosen.dtype == torch.bool
    assert chosen.tolist() == transcription.largest(score.tolist(), k)


@settings(max_examples=400 if CUDA else 20, deadline=None)
@given(
    seed=st.integers(0, 2**31), levels=st.sampled_from([0, 1, 2, 5, 1000, 10**6]), fraction=st.floats(0, 1),
    strange=st.booleans(), width=st.sampled_from([4.0, 4.0, 0.0, -4.0]), capacity=st.sampled_from([1024, 16]),
)  # fmt: skip
def test_a_bracket_is_the_stable_sort(device, seed, levels, fraction, strange, width, capacity):
    """Ties and NaN in bulk; brackets that hold, hold little and miss; lists of ties that overflow."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(-levels, levels + 1, (1500,), generator=generator) / max(levels, 1)
    if strange:
        for value in (torch.nan, torch.inf, -torch.inf, -0.0, 1e-45):
            score[torch.rand(1500, generator=generator) < 0.08] = value
    k = int(fraction * 1500)
    with pytest.MonkeyPatch.context() as patch:
        few_samples(patch)
        missing_brackets(patch, width)
        short_lists(patch, capacity)
        chosen = top_k(score.to(device), k, backend="gpu")
    assert torch.equal(chosen.cpu(), sorted_out(score, k))


def test_shapes_and_layouts(device):
    score = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(1)).to(device)
    for view in (score, score.transpose(0, 2), score[::2], score[0, 0, 0], score[:0], score.expand(2, 7, 3, 5)):
        for k in (0, 1, 2, 200):
            chosen = top_k(view, k, backend="gpu")
            assert chosen.shape == view.shape
            assert torch.equal(chosen.cpu(), sorted_out(view, k))
