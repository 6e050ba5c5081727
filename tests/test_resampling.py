"""Resampling: torchaudio's own for usual ratios, the same filter within bounds for all others, whatever the blocks."""

import sys
import time
import tracemalloc

import numpy as np
import pytest
import torch
import torchaudio

from modeling_lsm import resampling_lsm
from modeling_lsm.resampling_lsm import phase_kernel, reach, resample_blocks, resample_by_phases
from tests.tiny import noise


USUAL = [8_000, 11_025, 12_000, 22_050, 24_000, 32_000, 44_100, 48_000, 88_200, 96_000]


def reduced(rate: int) -> tuple[int, int]:
    divisor = np.gcd(rate, 16_000)
    return int(rate // divisor), int(16_000 // divisor)


@pytest.mark.parametrize("rate", USUAL)
def test_usual_rates_are_torchaudios(monkeypatch, rate):
    monkeypatch.setattr(resampling_lsm, "resample_by_phases", None)
    samples = noise(3.21, sampling_rate=rate)
    expected = torchaudio.functional.resample(torch.from_numpy(samples), *reduced(rate)).numpy()
    np.testing.assert_array_equal(np.concatenate(list(resample_blocks([samples], rate, 16_000))), expected)


@pytest.mark.parametrize("rate", [*USUAL, 8_012, 37_800])
def test_the_bounded_filter_is_torchaudios(rate):
    """But for rounding: torchaudio makes its kernel in float32."""
    samples = noise(0.1, sampling_rate=rate)
    expected = torchaudio.functional.resample(torch.from_numpy(samples), *reduced(rate)).numpy()
    np.testing.assert_allclose(
        resample_by_phases(samples, *reduced(rate)), expected, atol=5e-5
    )  # of 0.2: torchaudio's
    # kernel is made in float32


@pytest.mark.parametrize("rate", [22_254, 44_101, 47_999, 96_001, 383_999])
def test_awkward_rates_keep_what_is_below_both_limits(rate):
    """A chord, against itself as it would have been recorded at 16 kHz."""
    tones = (100, 333.3, 1000, 2718.28, 4000, 5000)
    at = {r: np.arange(2 * r) / r for r in (rate, 16_000)}
    samples, expected = (sum(0.1 * np.sin(2 * np.pi * hz * t + hz) for hz in tones) for t in at.values())
    (resampled,) = resample_blocks([samples.astype(np.float32)], rate, 16_000)
    assert len(resampled) == 32_000
    assert np.abs(resampled - expected)[200:-200].max() < 3e-3  # as at 48 kHz, with torchaudio


@pytest.mark.parametrize("rate", [11_025, 22_254, 48_000])
@pytest.mark.parametrize("sizes", [[1], [997], [20_000, 3, 50_000], [200_000]])
def test_blocks_do_not_show(monkeypatch, rate, sizes):
    samples = noise(200_000 / rate, sampling_rate=rate)
    (expected,) = resample_blocks([samples], rate, 16_000)
    monkeypatch.setattr(resampling_lsm, "BLOCK_SECONDS", 1)
    starts = np.cumsum(sizes * (len(samples) // sum(sizes)))[:3000]
    blocks = np.split(samples, starts[starts < len(samples)])
    resampled = list(resample_blocks(blocks, rate, 16_000))
    assert len(resampled) >= len(samples) // rate - 1
    np.testing.assert_allclose(np.concatenate(resampled), expected, atol=1e-6)


@pytest.mark.parametrize("rate", [22_254, 44_101, 47_999, 383_999])
def test_awkward_rates_are_cheap(rate):
    """A second of audio: at the first release seconds to minutes, and 1.5 to 9 GB."""
    phase_kernel.cache_clear()
    samples = noise(1, sampling_rate=rate)
    tracemalloc.start()
    start = time.perf_counter()
    assert len(resample_by_phases(samples, *reduced(rate))) == 16_000
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 5 and peak < 500e6, f"{seconds:.1f} s, {peak / 1e6:.0f} MB"


@pytest.mark.parametrize("samples", [1, 2, 3, 4_636, 4_637])
def test_few_samples(samples):
    for rate in (22_254, 48_000):
        (resampled,) = resample_blocks([noise(1, sampling_rate=samples)], rate, 16_000)
        assert len(resampled) == -(-samples * 16_000 // rate)


def test_nothing_needs_torchaudio(monkeypatch):
    samples = noise(1, sampling_rate=44_100)
    (expected,) = resample_blocks([samples], 44_100, 16_000)
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    (resampled,) = resample_blocks([samples], 44_100, 16_000)
    np.testing.assert_allclose(resampled, expected, atol=5e-5)


def test_the_kernel_reaches_as_far_as_the_filter():
    for source, target in ((441, 160), (147, 320), (11_127, 8_000), (383_999, 16_000)):
        kernel = phase_kernel(source, target)
        assert kernel.shape == (target, 2 * reach(source, target) + 2)
        np.testing.assert_allclose(kernel.sum(1), 1, atol=0.01)
