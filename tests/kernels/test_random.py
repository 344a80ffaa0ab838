"""Random numbers by address: right bits, good numbers, no copies of one another."""

from __future__ import annotations

import pytest
import torch

from selective.kernels import (
    AdamRule,
    Draw,
    Selection,
    Strength,
    sample_positions,
    selective_step,
    uniform,
    uniform_bits,
)
from selective.kernels.reference.random import SAMPLE_SIZE

N = 1 << 18


@pytest.mark.parametrize("draw", [Draw(0, 0), Draw(2**63 + 5, 10**9), Draw(-1, 1)])
def test_bits_are_the_documented_hash(draw, transcription):
    for offset in (0, 5, 2**31 - 3, 2**32 - 3, 2**33 + 7):  # both sides of the sign bit, and of the next keys
        wanted = [transcription.bits(draw.seed, draw.step, 9, offset + i) for i in range(6)]
        assert uniform_bits(draw, 9, 6, offset=offset).tolist() == wanted


def test_any_chunking_gives_the_same_numbers():
    whole = uniform(Draw(1, 2), 3, 1000)
    pieces = [uniform(Draw(1, 2), 3, min(n, 1000 - s), offset=s) for n in (37,) for s in range(0, 1000, n)]
    assert torch.equal(whole, torch.cat(pieces))
    assert whole.dtype == torch.float32
    assert uniform(Draw(1, 2), 3, 0).numel() == 0


def test_moments_bytes_and_correlations():
    """Five standard deviations each: a fair source fails one of these checks in some 100,000 addresses."""
    for address in range(4):
        u = uniform(Draw(7, 1), address, N).double()
        assert 0 <= u.min() <= u.max() < 1
        assert abs(u.mean() - 0.5) < 5 * (1 / 12 / N) ** 0.5
        assert abs(u.var() - 1 / 12) < 5 * (1 / 180 / N) ** 0.5
        bits = uniform_bits(Draw(7, 1), address, N)
        for shift in (0, 8, 16):
            counts = torch.bincount((bits >> shift) & 255, minlength=256).double()
            chi = ((counts - N / 256) ** 2 / (N / 256)).sum()
            assert abs(chi - 255) < 5 * (2 * 255) ** 0.5
        centred = u - u.mean()
        for lag in (1, 2, 3, 4, 8, 16, 64, 256, 1024, 4096):
            correlation = (centred[:-lag] * centred[lag:]).mean() * 12
            assert abs(correlation) < 5 / N**0.5


def test_no_shifted_or_permuted_copies():
    """Streams of neighbouring steps, addresses and seeds: no correlation at any of 2 N lags (by Fourier transform), nor
    where the index is xor-ed, which is how one keyed round would repeat itself. Bound: 7 sigma over 2^17 lags."""
    n = 1 << 16
    draws = [(Draw(0, 0), 0), (Draw(0, 1), 0), (Draw(0, 0), 1), (Draw(1, 0), 0), (Draw(1, 1), 1)]
    streams = [uniform(d, a, n).double() - 0.5 for d, a in draws]
    for i, a in enumerate(streams):
        for b in streams[i + 1 :]:
            spectrum = torch.fft.rfft(a, 2 * n) * torch.fft.rfft(b, 2 * n).conj()
            assert (torch.fft.irfft(spectrum).abs() * 12 / n**0.5).max() < 7
            for x in range(256):
                assert abs((a * b[torch.arange(n) ^ x]).sum()) * 12 / n**0.5 < 7


def test_global_generators_are_left_alone(make):
    before = torch.random.get_rng_state()
    rule = AdamRule(1e-2, 0.9, 0.99, 1e-8)
    for unit in ("element", "row", "tensor"):
        for backend in ("reference", "cpu"):
            selective_step(
                [make(rule, (30, 5))], rule=rule, selection=Selection("bernoulli", unit=unit),
                strength=Strength("mean_preserving", estimate="sampled"), draw=Draw(0, 0), backend=backend,
            )  # fmt: skip
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("probability", [0.0, 1.0, 2.0**-24])
def test_probability_at_its_ends(probability, make):
    rule = AdamRule(1e-2, 0.9, 0.99, 1e-8)
    for backend in ("reference", "cpu"):
        (sums,) = selective_step(
            [make(rule, (1000,))], rule=rule, selection=Selection("bernoulli", probability=probability),
            strength=Strength("fixed"), draw=Draw(0, 0), statistics=True, backend=backend,
        )  # fmt: skip
        assert sums.selected == (1000 if probability == 1 else 0)


def test_sample_is_stratified_and_small_tensors_are_taken_whole():
    assert sample_positions(Draw(0, 0), 0, SAMPLE_SIZE, "cpu") is None
    for numel in (SAMPLE_SIZE + 1, 10 * SAMPLE_SIZE + 3):
        positions = sample_positions(Draw(0, 0), 0, numel, "cpu")
        assert positions is not None
        assert positions.numel() == SAMPLE_SIZE
        assert positions.min() >= 0
        assert positions.max() < numel
        assert (positions.diff() > 0).all()  # no element twice
        counts = torch.bincount(positions * 16 // numel, minlength=16)
        assert (counts - SAMPLE_SIZE // 16).abs().max() <= 8  # a run may lie across an edge
    again = sample_positions(Draw(0, 1), 0, 10 * SAMPLE_SIZE, "cpu")
    assert not torch.equal(again, sample_positions(Draw(0, 0), 0, 10 * SAMPLE_SIZE, "cpu"))
