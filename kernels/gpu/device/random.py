"""Random numbers by address on the device: the same bits as `kernels/reference/random.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from .config import BRACKET_RUN


@triton.jit
def splitmix64(x):
    """One round of splitmix64 on uint64."""
    x = x + tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    x = (x ^ (x >> 30)) * tl.full((), 0xBF58476D1CE4E5B9, tl.uint64)
    x = (x ^ (x >> 27)) * tl.full((), 0x94D049BB133111EB, tl.uint64)
    return x ^ (x >> 31)


@triton.jit
def _finalise(x):
    """lowbias32 on uint32."""
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def random_bits(index, first_key, second_key):
    """The 24-bit numbers (uint32) of these indices (uint32)."""
    x = _finalise(index ^ first_key)
    return _finalise(x ^ second_key) >> 8


@triton.jit
def ranking_bits(index, first_key, second_key):
    """The 24-bit numbers (uint32) that a matched control ranks, of these indices (uint32)."""
    place = index & 3
    x = _finalise(_finalise((index >> 2) ^ first_key) ^ second_key)
    lower = _finalise(x ^ ((place + 1) * tl.full((), 0x9E3779B9, tl.uint32)))
    return (((x >> (place * 8)) & 0xFF) << 16) | (lower >> 16)


@triton.jit
def sample_position(i, numel, shift, first_key, second_key):
    """The flat index of sample `i`: a run of 8 neighbours in each of `2**shift` equal strata.

    The same as `sample_positions` of the reference. All but the keys are int64, and so is the result.
    """
    run = i >> 3
    left = run * numel >> shift  # the product stays below 2^63: at most 2^15 runs of tensors below 2^32 elements
    right = (run + 1) * numel >> shift
    bits = random_bits(run.to(tl.uint32), first_key, second_key).to(tl.int64)
    return left + (bits * (right - left - 7) >> 24) + (i & 7)


@triton.jit
def bracket_position(i, numel, shift, first_key, second_key):
    """The flat index of sample `i` for a bracket: a group of BRACKET_RUN elements in each of `2**shift` equal strata.

    Groups begin at multiples of BRACKET_RUN, so that each takes as few bursts of memory as possible. The elements after
    the last whole group are never drawn. There have to be `2**shift` groups or more. Types as for `sample_position`.
    """
    group = i // BRACKET_RUN
    groups = numel // BRACKET_RUN
    left = group * groups >> shift
    right = (group + 1) * groups >> shift
    bits = random_bits(group.to(tl.uint32), first_key, second_key).to(tl.int64)
    return (left + (bits * (right - left) >> 24)) * BRACKET_RUN + i % BRACKET_RUN
