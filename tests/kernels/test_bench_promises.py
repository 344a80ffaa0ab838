"""The benchmark's shapes, and the bytes that a step over them promises to move."""

from __future__ import annotations

import math

import pytest
import torch

from selective import (
    MGUP,
    Agreement,
    AlphaConsistency,
    Bernoulli,
    Cautious,
    CautiousMGUP,
    Dense,
    Everything,
    Grams,
    Magma,
    MeanPreserving,
    NormPreserving,
    Policy,
    RandomMask,
    TopK,
)
from selective.bench import SHAPES, Promise, promised_bytes


@pytest.mark.parametrize(
    "name, millions, tensors",
    [
        ("transformer-30m", 29.4, 50),
        ("gpt2", 124.4, 148),
        ("conv", 25.6, 161),
        ("llama-34m", 33.7, 75),
        ("llama-60m", 58.1, 75),
        ("llama-110m", 110.1, 111),
        ("llama-1b", 1100.0, 201),
    ],
)
def test_shape_sets_are_the_models_they_name(name, millions, tensors):
    assert sum(math.prod(shape) for shape in SHAPES[name]) / 1e6 == pytest.approx(millions, abs=0.1)
    assert len(SHAPES[name]) == tensors


def test_many_small_is_a_thousand_of_64_to_4096():
    sizes = [math.prod(shape) for shape in SHAPES["many-small"]]
    assert len(sizes) == 1000
    assert (min(sizes), max(sizes)) == (64, 4096)


NORM = NormPreserving()


@pytest.mark.parametrize(
    ("policy", "plain"),
    [
        (None, 28),
        (Dense(), 28),
        (CautiousMGUP(), 28),
        (Grams(), 28),
        (RandomMask(), 28),
        (MGUP(), 28),
        (MGUP(quantile="sampled"), 28),
        (Policy(selection=TopK(), strength=MeanPreserving()), 28),  # the share is K / d
        (Policy(selection=Everything(), strength=NORM), 28),
        (Cautious(), 36),
        (Cautious(estimate="sampled"), 28),
        (AlphaConsistency(), 36),
        (AlphaConsistency(strength=NormPreserving(of="momentum", estimate="sampled")), 28),
        (Magma(), 36),
        (Policy(selection=TopK(), strength=NormPreserving(of="momentum")), 40),  # the score is of the update
        (Policy(selection=TopK(score="momentum"), strength=NormPreserving(of="momentum")), 36),
        (Policy(selection=Bernoulli(), strength=NormPreserving(of="gradient")), 32),
    ],
    ids=repr,
)
def test_promised_bytes(policy, plain):
    assert promised_bytes(policy) == Promise(28, plain)
    assert promised_bytes(policy, torch.bfloat16) == Promise(14, plain / 2)


def test_the_norm_of_an_update_reads_float32_moments_again_and_rounded_ones_with_the_gradient():
    for selection in (Agreement(), TopK()):
        policy = Policy(selection=selection, strength=NORM)
        assert promised_bytes(policy) == Promise(28, 36)
        assert promised_bytes(policy, torch.bfloat16) == Promise(14, 20)
        assert promised_bytes(policy, state_bytes=1) == Promise(16, 22)


def test_promised_bytes_of_8_bit_moments():
    assert promised_bytes(state_bytes=1) == Promise(16, 16)
